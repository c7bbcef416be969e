"""The backends of the views: one table of how each makes them and why it refuses."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from contrastive_kit._checks import check_choice
from contrastive_kit.augment.backends import batched, cpu, triton
from contrastive_kit.augment.recipe import Recipe

Images = Tensor | Sequence[Tensor]


class Backend(NamedTuple):
    """How a backend makes views.

    Attributes:
        refuse: Why it cannot make views of these images in this dtype, or None if it can.
        render: Makes the views ``(V · B, 3, *size)`` of images from a table ``(V, B, columns)`` on
            their device, in a dtype and a memory format.
    """

    refuse: Callable[[Images, Recipe, torch.dtype], str | None]
    render: Callable[[Images, Tensor, Recipe, torch.dtype, torch.memory_format], Tensor]


class BackendChoice(NamedTuple):
    """Which backend runs, and why each backend before it in the order of preference does not.

    Attributes:
        name: The backend that runs.
        refusals: Name of a preferred backend to its reason.
    """

    name: str
    refusals: dict[str, str]


def choose(images: Images, recipe: Recipe, dtype: torch.dtype, backend: str) -> BackendChoice:
    """The named backend, or with "auto" the first that takes the images; raises if it refuses."""
    if backend != "auto":
        reason = BACKENDS[backend].refuse(images, recipe, dtype)
        if reason is not None:
            raise ValueError(f"backend {backend!r} cannot run here: {reason}")
        return BackendChoice(backend, {})
    refusals: dict[str, str] = {}
    for name, candidate in BACKENDS.items():
        reason = candidate.refuse(images, recipe, dtype)
        if reason is None:
            return BackendChoice(name, refusals)
        refusals[name] = reason
    raise ValueError(f"no backend can run here: {refusals}")


def check_backend(backend: str) -> None:
    """Raise unless ``backend`` is "auto" or the name of one."""
    check_choice("backend", backend, ("auto", *BACKENDS))


# In the order of preference.
BACKENDS = {
    "cpu": Backend(cpu.refusal, cpu.render),
    "triton": Backend(triton.refusal, triton.render),
    "torch": Backend(batched.refusal, batched.render),
}
