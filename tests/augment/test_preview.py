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


def test_pictures_are_read_upright_and_in_color(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = save(tmp_path / "turned.jpg", 20, 30, exif=exif)
    assert read_image(turned).shape == (3, 30, 20)
    Image.fromarray(np.zeros((5, 6), dtype=np.uint8)).save(tmp_path / "gray.png")
    assert read_image(tmp_path / "gray.png").shape == (3, 5, 6)


RAMP = np.linspace(0, 1, 32 * 40).reshape(32, 40)


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("16.png", (RAMP * 65535).round().astype(np.uint16)),
        ("12.png", (RAMP * 4095).round().astype(np.uint16)),
        ("8.png", (RAMP * 255).round().astype(np.uint16)),
        ("16.tiff", (RAMP * 65535).round().astype(np.uint16)),
        ("32.tiff", (RAMP * 65535).round().astype(np.int32)),
        ("signed.tiff", (RAMP * 3000 - 1000).round().astype(np.int32)),
        ("unit.tiff", RAMP.astype(np.float32)),
        ("bytes.tiff", (RAMP * 255).astype(np.float32)),
        ("wide.tiff", (RAMP * 1e4 - 50).astype(np.float32)),
        ("16.pgm", (RAMP * 65535).round().astype(np.uint16)),
    ],
)
def test_deep_pictures_are_neither_white_nor_black(tmp_path, name, pixels):
    Image.fromarray(pixels).save(tmp_path / name)
    read = read_image(tmp_path / name)
    assert read.shape == (3, 32, 40)
    assert read.dtype == torch.uint8
    expected = torch.from_numpy(RAMP * 255).expand(3, -1, -1)
    torch.testing.assert_close(read.double(), expected, atol=1, rtol=0)


def test_big_endian_and_nan(tmp_path):
    header = b"P5 40 32 65535\n"
    levels = (RAMP * 65535).round()
    (tmp_path / "big.pgm").write_bytes(header + levels.astype(">u2").tobytes())
    torch.testing.assert_close(
        read_image(tmp_path / "big.pgm")[0].double(), torch.from_numpy(RAMP * 255), atol=1, rtol=0
    )
    broken = RAMP.astype(np.float32)
    broken[0, 0], broken[0, 1] = np.nan, np.inf
    Image.fromarray(broken).save(tmp_path / "nan.tiff")
    assert read_image(tmp_path / "nan.tiff")[0, -1, -1] == 255
    Image.fromarray(np.full((4, 5), 7, np.float32)).save(tmp_path / "flat.tiff")
    assert read_image(tmp_path / "flat.tiff").unique().tolist() == [7]


def make_broken(folder):
    """Pictures that cannot be read, each by another error of Pillow's."""
    whole = save(folder / "whole.png", 20, 20).read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    save(folder / "whole.jpg", 64, 64)
    (folder / "truncated.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:700])
    (folder / "empty.png").write_bytes(b"")
    save(folder / "whole.dds", 8, 8)
    dds = bytearray((folder / "whole.dds").read_bytes())
    dds[80:84] = (8).to_bytes(4, "little")  # pixel format flags that are none
    (folder / "unknown.dds").write_bytes(dds)
    (folder / "folder.png").mkdir()


@pytest.mark.parametrize(
    "name",
    ["truncated.png", "truncated.jpg", "empty.png", "unknown.dds", "folder.png", "missing.png"],
)
def test_every_error_names_its_file_in_one_line(tmp_path, name):
    make_broken(tmp_path)
    good = str(save(tmp_path / "good.png", 20, 20))
    with pytest.raises(OSError, match=name):
        read_image(tmp_path / name)
    with pytest.raises(SystemExit) as stopped:
        main([good, str(tmp_path / name), "--size", "16", "--out", str(tmp_path / "out.png")])
    assert name in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "out.png").exists()


def test_a_decompression_bomb(tmp_path, monkeypatch):
    image = save(tmp_path / "bomb.png", 60, 60)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(
        SystemExit, match=r"bomb\.png: Image size \(3600 pixels\) exceeds"
    ) as stopped:
        main([str(image), "--size", "16", "--out", str(tmp_path / "out.png")])
    assert "\n" not in str(stopped.value)


def test_out_is_never_one_of_the_images(tmp_path):
    image = save(tmp_path / "a.png", 20, 20)
    before = image.read_bytes()
    (tmp_path / "link.png").symlink_to(image)
    for out in (image, tmp_path / "link.png", tmp_path / "." / "a.png"):
        with pytest.raises(SystemExit, match="--out must not be one of the images"):
            main([str(image), "--size", "16", "--out", str(out)])
    assert image.read_bytes() == before


@pytest.mark.parametrize("seed", [2**64, -(2**70), 10**40])
def test_any_whole_number_is_a_seed(tmp_path, seed):
    image = str(save(tmp_path / "a.png", 20, 20))
    main([image, "--size", "16", "--seed", str(seed), "--out", str(tmp_path / "out.png")])
    assert (tmp_path / "out.png").exists()


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
        (["{dir}/a.png", "--size", "32", "--out", "{dir}/views.what"], "{dir}/views.what: "),
        (["{dir}/a.png", "--size", "32", "--out", "{dir}/no/views.png"], "{dir}/no/views.png: "),
        (["{dir}/a.png", "--size", "30000000"], "memory"),
    ],
)
def test_what_goes_wrong_is_said_in_one_line(tmp_path, arguments, words):
    save(tmp_path / "a.png", 20, 20)
    (tmp_path / "text.txt").write_text("no picture")
    with pytest.raises(SystemExit) as stopped:
        main([argument.format(dir=tmp_path) for argument in arguments])
    assert words.format(dir=tmp_path) in str(stopped.value)
    assert "\n" not in str(stopped.value)


def test_bad_calls():
    with pytest.raises(ValueError, match="images must hold at least one"):
        contact_sheet([], SimCLRAugment(8))
    augment = SimCLRAugment(8, normalize=((0, 0, 0), (1, 1, 1)))
    with pytest.raises(ValueError, match="augment must not normalize"):
        contact_sheet([torch.zeros(3, 9, 9, dtype=torch.uint8)], augment)


def test_it_runs_as_a_module(tmp_path):
    image = save(tmp_path / "a.png", 20, 20)
    command = [sys.executable, "-m", "contrastive_kit.preview", str(image), "--size", "16"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout == "views.png: 6 views of each of 1 images\n"
    assert (tmp_path / "views.png").exists()
