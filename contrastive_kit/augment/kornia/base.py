"""What the modules share in Kornia's pipelines.

Each module draws its probability gate itself, as one more column of its parameters, and tells
Kornia that it always applies. So the gate, the factors and their order come from one
``torch.rand`` of fixed width, on the generator the module was given; skipped samples are the same
in every Kornia release; and nothing has to look at the gate on the host.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from kornia.augmentation import GeometricAugmentationBase2D, IntensityAugmentationBase2D
from kornia.augmentation.random_generator import RandomGeneratorBase
from torch import Tensor

from contrastive_kit._checks import check_flag
from contrastive_kit.augment._random import Draws
from contrastive_kit.augment.parameters import to_device, to_probability

Params = dict[str, Tensor]
Range = tuple[float, float]


class Draw(RandomGeneratorBase, Draws):  # type: ignore[misc]
    """Parameters from one row of uniform numbers a sample.

    Args:
        columns: How many uniform numbers a sample takes.
        from_uniforms: Makes the parameters from ``(B, columns)`` uniform numbers and the shape of
            the images.
        generator: Where the numbers come from; the default CPU generator if None.
    """

    def __init__(
        self,
        columns: int,
        from_uniforms: Callable[[Tensor, tuple[int, ...]], Params],
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.columns = columns
        self.from_uniforms = from_uniforms
        self.generator = generator

    def make_samplers(self, device: torch.device, dtype: torch.dtype) -> None:
        """Nothing to make: the draw stays in float32 where the generator is."""

    def forward(self, batch_shape: tuple[int, ...], same_on_batch: bool = False) -> Params:
        """Draw the parameters of a batch of this shape."""
        rows = min(1, batch_shape[0]) if same_on_batch else batch_shape[0]
        uniforms = self.uniforms(rows, self.columns, by_rank=True)
        return self.from_uniforms(uniforms.expand(batch_shape[0], -1), tuple(batch_shape))


class _AugmentationMixin:
    """Shared by the intensity and the geometric modules.

    Args:
        columns: How many uniform numbers `draw` takes of a sample.
        options: The module's own, as ``repr`` shows them.
        p: Probability that a sample is changed, if the class is gated.
        same_on_batch: One draw for all samples.
        keepdim: A single image stays one.
        generator: Where the numbers come from; the default CPU generator if None.

    Attributes:
        gated: Whether a sample is changed with probability p, which is drawn first, as "apply".
    """

    gated: ClassVar[bool] = True

    def __init__(
        self,
        columns: int,
        options: str,
        *,
        p: float = 1.0,
        same_on_batch: bool,
        keepdim: bool,
        generator: torch.Generator | None,
    ) -> None:
        check_flag("same_on_batch", same_on_batch)
        check_flag("keepdim", keepdim)
        if self.gated:
            p = to_probability("p", p)
            options = f"{options}, p={p}" if options else f"p={p}"
        of_kornia = {"p": 1.0, "p_batch": 1.0, "same_on_batch": same_on_batch, "keepdim": keepdim}
        super().__init__(**of_kornia)
        self._param_generator = Draw(self.gated + columns, self._from_uniforms, generator)
        self._options = options
        self.probability = p

    def _from_uniforms(self, uniforms: Tensor, shape: tuple[int, ...]) -> Params:
        if not self.gated:
            return self.draw(uniforms, shape)
        gate = (uniforms[:, 0] < self.probability).float()
        return {"apply": gate, **self.draw(uniforms[:, 1:], shape)}

    def draw(self, uniforms: Tensor, shape: tuple[int, ...]) -> Params:
        """The parameters beside the gate, from ``(B, columns)`` numbers and the images' shape."""
        return {}

    def __unpack_input__(self, input: Tensor) -> Tensor:
        # Not in transform_tensor: Kornia keeps the images alive for a class that overrides that.
        check_tensor(input)
        return input.float() / 255 if input.dtype == torch.uint8 else input

    def transform_masks(
        self,
        input: Tensor,
        params: Params,
        flags: dict[str, Any],
        transform: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As Kornia's; says what happened where a container has cast a mask to uint8."""
        if input.dtype == torch.uint8:
            raise TypeError(
                "masks must be floating, got torch.uint8. AugmentationSequential casts masks to "
                "the dtype of the images: beside masks, pass the images as floats in [0, 1]"
            )
        masks: Tensor = super().transform_masks(  # type: ignore[misc]
            input, params, flags, transform=transform, **kwargs
        )
        return masks

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._options})"


class Intensity(_AugmentationMixin, IntensityAugmentationBase2D):  # type: ignore[misc]
    """Base of the modules that change colors and leave every pixel in its place.

    Attributes:
        operation: Of `functional`; takes the images, what is drawn and the flags, by name.
        drawn: The names of the drawn parameters that it takes.
    """

    operation: ClassVar[Callable[..., Tensor]]
    drawn: ClassVar[tuple[str, ...]] = ("apply",)

    def apply_transform(
        self, input: Tensor, params: Params, flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        """Change the chosen samples."""
        drawn = {name: to_device_of(params[name], input) for name in self.drawn}
        return self.operation(input, **drawn, **{name: flags[name] for name in self.flags})


class Geometric(_AugmentationMixin, GeometricAugmentationBase2D):  # type: ignore[misc]
    """Base of the modules that move pixels."""


def check_tensor(images: object) -> None:
    """Raise unless the images are a tensor, and say how pictures become one."""
    if not isinstance(images, Tensor):
        raise TypeError(
            f"images must be a tensor, got {type(images).__name__}; for PIL images and arrays "
            "there is torchvision.transforms.functional.pil_to_tensor and torch.from_numpy"
        )


def uniform(numbers: Tensor, bounds: Range) -> Tensor:
    """Uniform numbers in a range."""
    return numbers * (bounds[1] - bounds[0]) + bounds[0]


def to_device_of(parameter: Tensor, images: Tensor) -> Tensor:
    """The parameter on the device of the images."""
    return to_device(parameter, images.device)


def resized_to(size: tuple[int, int], batch: int) -> Params:
    """The parameter by which Kornia's containers draw what follows for images of the new size."""
    # Kornia before 0.9 reads the first row, also where there is none.
    sizes = torch.tensor(size, dtype=torch.long, device="cpu")
    return {"output_size": sizes.expand(batch, 2)} if batch else {}


def crop_matrix(box: Tensor, flip: Tensor, size: tuple[int, int]) -> Tensor:
    """``(B, 3, 3)``: from source pixels (x, y) to those of a flipped, resized crop."""
    top, left, height, width = box.unbind(-1)
    scale_x, scale_y = size[1] / width, size[0] / height
    shift_x, shift_y = (0.5 - left) * scale_x - 0.5, (0.5 - top) * scale_y - 0.5
    scale_x, shift_x = (
        torch.where(flip != 0, -scale_x, scale_x),
        torch.where(flip != 0, size[1] - 1 - shift_x, shift_x),
    )
    zero, one = torch.zeros_like(scale_x), torch.ones_like(scale_x)
    rows = (scale_x, zero, shift_x, zero, scale_y, shift_y, zero, zero, one)
    return torch.stack(rows, dim=-1).reshape(-1, 3, 3)
