"""One world of each size for all tests, and a marker on every test that asks for one."""

import pytest
from worlds import World

_WORLDS = {size: World(size) for size in (1, 2, 3, 4)}


@pytest.fixture(scope="session", autouse=True)
def _stop_worlds():
    yield
    for world in _WORLDS.values():
        world.stop()


@pytest.fixture(params=sorted(_WORLDS), ids=lambda size: f"{size} processes")
def world(request):
    return _WORLDS[request.param]


@pytest.fixture(params=[size for size in _WORLDS if size > 1], ids=lambda size: f"{size} processes")
def several(request):
    """A world of more than one process."""
    return _WORLDS[request.param]


@pytest.fixture(params=[2, 3], ids=lambda size: f"{size} processes")
def few(request):
    """A world of two processes, and one of three, for what costs more."""
    return _WORLDS[request.param]


@pytest.fixture
def alone():
    """The world of one process."""
    return _WORLDS[1]


@pytest.fixture
def pair():
    """The world of two processes, for what does not depend on their number."""
    return _WORLDS[2]


def pytest_collection_modifyitems(items):
    for item in items:
        if {"world", "several", "few", "pair", "alone"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("distributed")
