"""A folder of images that tests only read, and a run in it to compare others with."""

import pytest
from trainer import command, make_image_folder

from train import run


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def whole(root, tmp_path_factory):
    """Scores and folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    return run.main(command(root, out=folder)), folder
