"""Public names, their parameters and defaults: changing one is a decision, not an accident.

After a deliberate change run ``python tests/test_api_surface.py`` and list it in CHANGELOG.md.
"""

import importlib
import inspect
import json
from pathlib import Path

from torch import nn

SURFACE = Path(__file__).with_name("api_surface.json")
MODULES = [
    "contrastive_kit",
    "contrastive_kit.functional",
    "contrastive_kit.losses",
    "contrastive_kit.ops",
    "contrastive_kit.augment",
    "contrastive_kit.augment.functional",
    "contrastive_kit.evaluation",
    "contrastive_kit.reference",
]


def _signature(thing):
    if inspect.isclass(thing) or inspect.isfunction(thing):
        surface = _parameters(thing)
        # Inherited too: Kornia 0.9 copies it into every class, earlier releases do not.
        if inspect.isclass(thing) and issubclass(thing, nn.Module):
            return {"__init__": surface, "forward": _parameters(thing.forward)[1:]}
        return surface
    return type(thing).__name__


def _parameters(function):
    """Annotations are left to the type checker."""
    parameters = inspect.signature(function).parameters.values()
    return [str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters]


def current_surface():
    surface = {}
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        own = [n for n, x in vars(module).items() if getattr(x, "__module__", "") == module_name]
        exported = getattr(module, "__all__", [n for n in own if not n.startswith("_")])
        names = [n for n in exported if n != "__version__"]
        surface[module_name] = {n: _signature(getattr(module, n)) for n in sorted(names)}
    return surface


def test_public_names_and_parameters_are_as_recorded():
    assert current_surface() == json.loads(SURFACE.read_text())


if __name__ == "__main__":
    SURFACE.write_text(json.dumps(current_surface(), indent=2) + "\n")
