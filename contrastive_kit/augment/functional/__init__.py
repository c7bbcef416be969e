r"""Batched image operations with explicit parameters, one value per sample.

Each function equals torchvision's floating point operation applied image by image, to float32
rounding. None draws random numbers, waits for the GPU or modifies its input, and all can be
differentiated with respect to the images. Images are ``(B, C, H, W)``, floating in [0, 1] or uint8
in 0...255, in any memory format. `crop_resize` keeps uint8; every other function turns it into
float32 in [0, 1]. Half precision is computed in float32 and rounded once, at the end.

A parameter is one number for all samples, or a ``(B,)`` tensor on the device of the images.
"""

from contrastive_kit.augment.functional.blur import check_kernel, gaussian_blur
from contrastive_kit.augment.functional.color import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    color_jitter,
    grayscale,
    solarize,
)
from contrastive_kit.augment.functional.crop import Interpolation as Interpolation
from contrastive_kit.augment.functional.crop import (
    can_interpolate,
    check_boxes,
    check_interpolation,
    check_size,
    crop_matmul,
    crop_resize,
    resize_matrix,
    to_levels,
)
from contrastive_kit.augment.functional.images import check_images

__all__ = [
    "adjust_brightness",
    "adjust_contrast",
    "adjust_hue",
    "adjust_saturation",
    "can_interpolate",
    "check_boxes",
    "check_images",
    "check_interpolation",
    "check_kernel",
    "check_size",
    "color_jitter",
    "crop_matmul",
    "crop_resize",
    "gaussian_blur",
    "grayscale",
    "resize_matrix",
    "solarize",
    "to_levels",
]
