"""A whole SimCLR view as one module of Kornia's pipelines."""

from typing import Any

import torch
from torch import Tensor

from contrastive_kit.augment import functional
from contrastive_kit.augment.kornia.base import (
    Params,
    check_tensor,
    crop_matrix,
    resized_to,
    to_device_of,
)
from contrastive_kit.augment.kornia.geometric import _MODES, Cropping
from contrastive_kit.augment.parameters import N_UNIFORMS, unpack
from contrastive_kit.augment.simclr import SimCLRAugment


class SimCLRView(Cropping):
    """One view of `SimCLRAugment`, fused, as a single module of an ``AugmentationSequential``.

    Crop, horizontal flip, colors and blur in one step. Masks are cropped and flipped with the
    nearest pixel, boxes and keypoints move along, and `inverse` undoes the geometry and leaves the
    colors.

    Args:
        augment: Makes one view; its recipe, generator and backend are used.
        same_on_batch: One set of parameters for all samples.
        keepdim: A single ``(3, H, W)`` image stays one.

    Raises:
        ValueError: If `augment` makes more than one view.

    Shape:
        ``(B, 3, H, W)`` or ``(3, H, W)``, floating in [0, 1] or uint8, to ``(B, 3, *size)`` in the
        dtype of `augment`.

    Example:
        >>> import torch
        >>> from kornia.augmentation import AugmentationSequential
        >>> view = SimCLRView(SimCLRAugment(32, views=1))
        >>> pipeline = AugmentationSequential(view, data_keys=["image", "mask"])
        >>> image, mask = pipeline(torch.rand(2, 3, 40, 40), torch.ones(2, 1, 40, 40))
        >>> image.shape, mask.shape
        (torch.Size([2, 3, 32, 32]), torch.Size([2, 1, 32, 32]))
    """

    def __init__(
        self, augment: SimCLRAugment, *, same_on_batch: bool = False, keepdim: bool = False
    ) -> None:
        if augment.recipe.views != 1:
            raise ValueError(f"augment must make one view, got views={augment.recipe.views}")
        super().__init__(
            N_UNIFORMS,
            augment.extra_repr(),
            same_on_batch=same_on_batch,
            keepdim=keepdim,
            generator=augment.generator,
        )
        self.augment = augment
        recipe = augment.recipe
        self.keep_flags(recipe.size, recipe.interpolation, recipe.antialias)

    def draw(self, uniforms: Tensor, shape: tuple[int, ...]) -> Params:
        """The parameter table."""
        table = self.augment.recipe.table(uniforms[None], height=shape[-2], width=shape[-1])
        return {"table": table[0], **resized_to(self.flags["size"], shape[0])}

    def __unpack_input__(self, input: Tensor) -> Tensor:
        check_tensor(input)
        return input

    def transform_tensor(
        self, input: Tensor, *, shape: Tensor | None = None, match_channel: bool = True
    ) -> Tensor:
        """As Kornia's; lets uint8 images pass, which are cropped before they become floats."""
        if input.dtype == torch.uint8 and shape is None:
            return input if input.ndim == 4 else input[None]
        tensor: Tensor = super().transform_tensor(input, shape=shape, match_channel=match_channel)
        return tensor

    def validate_tensor(self, input: Tensor) -> None:
        """As Kornia's; lets uint8 images pass."""
        if input.dtype != torch.uint8:
            super().validate_tensor(input)

    def transform_inputs(
        self,
        input: Tensor,
        params: Params,
        flags: dict[str, Any],
        transform: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As Kornia's, which under autocast would cast the view to the dtype of a uint8 image."""
        params, flags = self._process_kwargs_to_params_and_flags(
            self._params if params is None else params, flags, **kwargs
        )
        images = self.transform_tensor(input)
        self.validate_tensor(images)
        return self.apply_transform(images, params, flags, transform)

    def compute_transformation(
        self, input: Tensor, params: Params, flags: dict[str, Any]
    ) -> Tensor:
        """The matrices from source to view pixels."""
        p = unpack(to_device_of(params["table"], input))
        matrix = crop_matrix(p.box, p.flip, flags["size"])
        return matrix.to(input.dtype) if input.is_floating_point() else matrix

    def apply_transform(
        self, input: Tensor, params: Params, flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        """Make the views."""
        table = to_device_of(params["table"], input)[None]
        views: Tensor = self.augment(input, params=table, concat=True)
        return views

    def apply_transform_mask(
        self, input: Tensor, params: Params, flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        """Crop and flip, nothing else."""
        p = unpack(to_device_of(params["table"], input))
        chosen = flags["resample"].name.lower()
        # Kornia 0.7 leaves the choice of "nearest" to this method, later releases make it before.
        is_default = chosen == self.flags["resample"].name.lower()
        return functional.crop_resize(
            input,
            p.box,
            flags["size"],
            flip=p.flip,
            interpolation="nearest" if is_default else _MODES[chosen],
            antialias=flags["antialias"],
        )
