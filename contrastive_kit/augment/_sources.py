"""What a data set hands over as an image: PIL images, arrays and tv_tensors beside plain tensors.

None of these packages is imported here: where such an image comes from, its package is loaded.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    OneImage = Tensor | Image | NDArray[Any]
    Source = OneImage | Sequence[OneImage]


class Batch(NamedTuple):
    """Images as the backends take them.

    Attributes:
        images: ``(B, C, H, W)``, or a list of images ``(C, H_i, W_i)``.
        single: Whether they were one image, whose views have no batch dimension.
        like: The tv_tensor they were, or None.
    """

    images: Any
    single: bool = False
    like: Tensor | None = None

    def shaped(self, views: Tensor) -> Tensor:
        """Views ``(B, C, H, W)`` as the caller expects them."""
        if self.single:
            views = views[0]
        return views if self.like is None else _tv_tensors().wrap(views, like=self.like)


def to_batch(source: "Source") -> Batch:
    """The images as tensors; raises where they are neither images nor a list of some."""
    if isinstance(source, Tensor):
        like = None
        if type(source) is not Tensor and _is_of("torchvision.tv_tensors", "Image", source):
            like, source = source, source.as_subclass(Tensor)
        return Batch(source[None], True, like) if source.ndim == 3 else Batch(source, False, like)
    image = _as_tensor(source)
    if isinstance(image, Tensor):
        return Batch(image[None], True)
    if not isinstance(source, Sequence) or isinstance(source, str) or not source:
        raise TypeError(
            "images must be a tensor, a PIL image, a NumPy array (H, W, 3) or a non-empty list of "
            f"them, got {type(source).__name__}"
        )
    return Batch([_as_tensor(image) for image in source])


def _as_tensor(image: Any) -> Any:
    """A PIL image or an array as ``(3, H, W)``, in a tensor of its own; anything else as it is."""
    if _is_of("PIL.Image", "Image", image):
        if image.mode != "RGB":
            raise ValueError(
                f"images must be RGB, got a PIL image of mode {image.mode!r}; "
                "image.convert('RGB') makes it so"
            )
        from torchvision.transforms.functional import pil_to_tensor

        return pil_to_tensor(image)
    if _is_of("numpy", "ndarray", image):
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"images must be (H, W, 3) if they are NumPy arrays, got {image.shape}; a batch "
                "(B, H, W, 3) is torch.from_numpy(images).permute(0, 3, 1, 2)"
            )
        return torch.from_numpy(image.copy()).permute(2, 0, 1)
    return image


def _is_of(module: str, name: str, x: object) -> bool:
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(x, getattr(loaded, name))


def _tv_tensors() -> Any:
    return sys.modules["torchvision.tv_tensors"]
