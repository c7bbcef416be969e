"""The contact sheet."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from contrastive_kit import SimCLRAugment
from contrastive_kit.preview import contact_sheet, main, read_image


def save(path, height, width, **options):
    x = np.arange(height * width * 3).reshape(height, width, 3) % 251
    Image.fromarray(x.astype(np.uint8)).save(path, **options)
    return path


def test_sheet_holds_the_images_and_their_views(tmp_path):
    paths = [save(tmp_path / "a.png", 40, 60), save(tmp_path / "b.png", 50, 30)]
    images = [read_image(path) for path in paths]
    augment = SimCLRAugment(32, views=3, generator=torch.Generator().manual_seed(0))
    views = augment(images)
    augment.generator.manual_seed(0)
    sheet = contact_sheet(images, augment)
    assert sheet.shape == (3, 4 + 2 * 36, 4 + 4 * 36)
    for row in range(2):
        for column in range(3):
            top, left = 4 + 36 * row, 4 + 36 * (column + 1)
            expected = (views[column][row] * 255).round().byte()
            assert torch.equal(sheet[:, top : top + 32, left : left + 32], expected)
    # The 40 x 60 image fills the width, and 21 of 32 rows.
    first = sheet[:, 4:36, 4:36]
    assert (first[:, 0] == 255).all()
    assert (first[:, 16] != 255).any()
    assert (sheet[:, :4] == 255).all()


def test_command_line_writes_the_same_picture_again(tmp_path):
    image = str(save(tmp_path / "a.png", 40, 60))
    for name in ("one.png", "two.png"):
        main([image, "--size", "24", "--views", "2", "--out", str(tmp_path / name)])
    one, two = (Image.open(tmp_path / name) for name in ("one.png", "two.png"))
    assert one.size == (4 + 3 * 28, 32)
    assert np.array_equal(np.array(one), np.array(two))
    main(
        [
            image,
            "--size",
            "24",
            "--recipe",
            "byol",
            "--strength",
            "0.5",
            "--out",
            str(tmp_path / "c.jpg"),
        ]
    )
    assert Image.open(tmp_path / "c.jpg").size == (4 + 3 * 28, 32)


def test_pictures_are_read_upright_and_in_colour(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = save(tmp_path / "turned.jpg", 20, 30, exif=exif)
    assert read_image(turned).shape == (3, 30, 20)
    Image.fromarray(np.zeros((5, 6), dtype=np.uint8)).save(tmp_path / "gray.png")
    assert read_image(tmp_path / "gray.png").shape == (3, 5, 6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.png"], "missing.png"),
        (["{dir}/text.txt"], "cannot identify image file"),
        (["{dir}/a.png", "--size", "32", "--views", "0"], "views must be a positive int, got 0"),
        (["{dir}/a.png", "--size", "0"], "size must be a positive int"),
        (["{dir}/a.png", "--size", "32", "--strength", "-1"], "strength must be"),
        (["{dir}/a.png", "--size", "32", "--views", "3", "--recipe", "byol"], "blur must be"),
        (["{dir}/a.png", "--size", "32", "--out", "{dir}/views.what"], "unknown file extension"),
    ],
)
def test_what_goes_wrong_is_said_in_one_line(tmp_path, arguments, words):
    save(tmp_path / "a.png", 20, 20)
    (tmp_path / "text.txt").write_text("no picture")
    with pytest.raises(SystemExit) as stopped:
        main([argument.format(dir=tmp_path) for argument in arguments])
    assert words in str(stopped.value)
    assert "\n" not in str(stopped.value)


def test_bad_calls():
    with pytest.raises(ValueError, match="images must hold at least one"):
        contact_sheet([], SimCLRAugment(8))
    augment = SimCLRAugment(8, normalize=((0, 0, 0), (1, 1, 1)))
    with pytest.raises(ValueError, match="augment must not normalise"):
        contact_sheet([torch.zeros(3, 9, 9, dtype=torch.uint8)], augment)


def test_it_runs_as_a_module(tmp_path):
    image = save(tmp_path / "a.png", 20, 20)
    command = [sys.executable, "-m", "contrastive_kit.preview", str(image), "--size", "16"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout == "views.png: 6 views of each of 1 images\n"
    assert (tmp_path / "views.png").exists()
