"""SimCLR's stochastic augmentation: V independent views of a batch, in one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import torch
from torch import Tensor

from contrastive_kit._checks import check_flag
from contrastive_kit.augment import functional
from contrastive_kit.augment._random import Draws
from contrastive_kit.augment._sources import to_batch
from contrastive_kit.augment.backends import (
    BACKENDS,
    BackendChoice,
    Images,
    check_backend,
    choose,
)
from contrastive_kit.augment.parameters import (
    COLUMN,
    N_COLUMNS,
    N_UNIFORMS,
    to_device,
    unpack,
)
from contrastive_kit.augment.recipe import Options, Recipe

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from contrastive_kit.augment._sources import Source

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# How far beyond [0, 1] the weights of a resize may take a float.
_ROUNDING = 1e-3

Views = tuple[Tensor, ...]

SIMCLR = Recipe()

_Init = TypeVar("_Init", bound=Callable[..., None])


def _with_options(init: _Init) -> _Init:
    """Name a recipe's options in the signature of ``__init__``, for ``help()`` and editors.

    The default shown is ``...``, as an option that is not given is that of the recipe.
    """
    own = signature(init)
    parameters = list(own.parameters.values())[:-1]
    parameters += [
        Parameter(name, Parameter.KEYWORD_ONLY, default=..., annotation=annotation)
        for name, annotation in Options.__annotations__.items()
    ]
    init.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    return init


class SimCLRAugment(Draws):
    r"""Independent random views of each image: crop, flip, color jitter, grayscale, blur.

    The augmentation of SimCLR (Chen et al., 2020, appendix A), with torchvision's definition of
    each operation: an antialiased bilinear ``RandomResizedCrop``, a horizontal flip with
    probability 0.5, ``ColorJitter(0.8s, 0.8s, 0.8s, 0.2s)`` with probability 0.8, grayscale
    with probability 0.2, and a Gaussian blur over 10 % of the side with probability 0.5. Every
    sample has parameters of its own, the order of its color operations included.

    uint8 images are cropped in uint8 and their colors changed in floats, as torchvision's tensor
    transforms do. Feed uint8 where you can: it is a quarter of the bytes and faster to crop.

    All random numbers come from one ``torch.rand`` on the CPU (or on the generator's device), so
    the same seed gives the same views on every device. Nothing waits for the GPU.

    Beside the result the CPU backend needs a few MB and the torch backend about ten times the
    result. The Triton backend needs 3 bytes a pixel for uint8 images and 12 for floats; if there is
    a blur, 12 more for uint8 images and 12 more for views in half precision.

    Args:
        size: Height and width of the views in pixels, or both as one number.
        recipe: What a view is; SimCLR's by default. `IMAGENET`, `CIFAR`, `GOOGLE_RESEARCH` and
            `BYOL` of `contrastive_kit.augment.recipe` are others.
        generator: Where the random numbers come from; the default CPU generator if None. In
            DataLoader workers, and on other ranks than the first, one on the CPU gives each worker,
            epoch and rank numbers of its own.
        backend: "cpu" (in place, in chunks), "triton" (fused kernels on a CUDA device), "torch"
            (batched; any device, differentiable), or "auto": the first of these that takes the
            images.
        dtype: Of the views: float32, float16, bfloat16 or float64. ``.to(dtype)``, ``.half()`` and
            the like, of this module or of a model that holds it, change it.
        memory_format: Of the views: ``torch.contiguous_format`` or ``torch.channels_last``.
        check_values: Raise where floats lie outside [0, 1] further than rounding takes them. By
            default, None, images on the CPU are looked at; True looks at all, and waits for the
            GPU; False at none.
        options: Options of a `Recipe`, such as ``strength=0.5``, ``views=3`` or ``blur=True``: they
            replace those of `recipe`.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If `dtype` is not floating, a flag is not True or False, something is no number
            where one is expected, or an option is not one of `Recipe`'s.

    Example:
        >>> import torch
        >>> augment = SimCLRAugment(32, strength=0.5, generator=torch.Generator().manual_seed(0))
        >>> images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
        >>> (v1, v2), params = augment(images, return_params=True)
        >>> v1.shape, v1.dtype, params.shape[:2]
        (torch.Size([8, 3, 32, 32]), torch.float32, torch.Size([2, 8]))
        >>> again, _ = augment(images, params=params)
        >>> torch.equal(v1, again)
        True
    """

    @_with_options
    def __init__(
        self,
        size: int | tuple[int, int],
        *,
        recipe: Recipe = SIMCLR,
        generator: torch.Generator | None = None,
        backend: Literal["auto", "cpu", "triton", "torch"] = "auto",
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        check_values: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        if not isinstance(recipe, Recipe):
            raise TypeError(f"recipe must be a Recipe, got {type(recipe).__name__}")
        check_backend(backend)
        if dtype not in _DTYPES:
            raise TypeError(
                f"dtype must be floating: torch.float32, float16, bfloat16 or float64; got {dtype}"
            )
        if check_values is not None:
            check_flag("check_values", check_values)
        if memory_format not in (torch.contiguous_format, torch.channels_last):
            raise ValueError(
                "memory_format must be torch.contiguous_format or torch.channels_last, "
                f"got {memory_format}"
            )
        self.recipe: Recipe = replace(recipe, size=functional.check_size(size), **options)
        self.generator = generator
        self.backend = backend
        self.dtype: torch.dtype = dtype
        self.memory_format = memory_format
        self.check_values = check_values

    def which_backend(self, images: Source) -> BackendChoice:
        """Tell which backend makes the views of these images, and why not those before it.

        Args:
            images: As for the call.

        Raises:
            ValueError: If the named backend does not take the images.

        Example:
            >>> import torch
            >>> SimCLRAugment(32).which_backend(torch.rand(2, 3, 40, 40))
            BackendChoice(name='cpu', refusals={})
        """
        batch = to_batch(images).images
        _check_images(batch)
        return choose(batch, self.recipe, self.dtype, self.backend)

    def draw(self, images: Source) -> Tensor:
        """Draw the parameters of the views of these images, without making the views.

        A generator of one's own in the same state gives the same table on every rank: to divide a
        table of the whole batch among the ranks.

        Args:
            images: As for the call.

        Returns:
            The parameter table, ``(views, B, columns)`` float32 on the generator's device;
            `contrastive_kit.augment.parameters.unpack` names its columns.
        """
        batch = to_batch(images).images
        _check_images(batch)
        return self._table(batch, by_rank=False)

    def _table(self, images: Images, *, by_rank: bool) -> Tensor:
        if isinstance(images, Tensor):
            height: int | Tensor = images.shape[-2]
            width: int | Tensor = images.shape[-1]
        else:
            device = "cpu" if self.generator is None else self.generator.device
            height, width = torch.tensor(
                [image.shape[-2:] for image in images], dtype=torch.float32, device=device
            ).unbind(-1)
        uniforms = self.uniforms(self.recipe.views, len(images), N_UNIFORMS, by_rank=by_rank)
        return self.recipe.table(uniforms, height=height, width=width)

    @overload
    def forward(
        self,
        images: Source,
        *,
        params: Tensor | None = ...,
        return_params: Literal[False] = ...,
        concat: Literal[False] = ...,
    ) -> Views: ...

    @overload
    def forward(
        self,
        images: Source,
        *,
        params: Tensor | None = ...,
        return_params: Literal[False] = ...,
        concat: Literal[True],
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        images: Source,
        *,
        params: Tensor | None = ...,
        return_params: Literal[True],
        concat: Literal[False] = ...,
    ) -> tuple[Views, Tensor]: ...

    @overload
    def forward(
        self,
        images: Source,
        *,
        params: Tensor | None = ...,
        return_params: Literal[True],
        concat: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        images: Source,
        *,
        params: Tensor | None = None,
        return_params: bool = False,
        concat: bool = False,
    ) -> Tensor | Views | tuple[Tensor | Views, Tensor]:
        """Make the views.

        Args:
            images: ``(B, 3, H, W)``, or a list of B images ``(3, H_i, W_i)`` of one dtype on one
                device; uint8, or floating in [0, 1]. Or one image, as data sets have them:
                ``(3, H, W)``, a PIL image in RGB, a NumPy array ``(H, W, 3)``; a list may hold
                these too. So a `SimCLRAugment` is the ``transform`` of a data set.
            params: A parameter table, to make the same views again or views of one's own.
            return_params: Return the parameter table too.
            concat: Return the views as one batch.

        Returns:
            A tuple of `views` tensors ``(B, 3, *size)`` that share one buffer; with `concat` that
            buffer, ``(views · B, 3, *size)``, view by view. With `return_params` a pair of that
            and the parameter table. Views of one image are ``(3, *size)``; with `concat` they are
            ``(views, 3, *size)``. Views of a ``tv_tensors.Image`` are such images too.

        Raises:
            ValueError: If a shape does not fit, the named backend does not take the images, or
                `check_values` finds some out of range. If `params` on the CPU are not finite, or
                hold a box that is not inside its image, an order of the color operations that is
                no permutation, a sigma of 0 for a blur, or a step whose probability is 0 here.
            TypeError: If the images are neither uint8 nor floating, or `params` are not floating.
        """
        source = to_batch(images)
        batch: Images = source.images
        first = _check_images(batch)
        check_flag("return_params", return_params)
        check_flag("concat", concat)
        if self._looks_at_values(first):
            _check_range(batch)
        if params is None:
            table = self._table(batch, by_rank=True)
        else:
            table = self._check_params(params, batch)
        chosen = BACKENDS[choose(batch, self.recipe, self.dtype, self.backend).name]
        on_device = to_device(table.float(), first.device)
        made = chosen.render(batch, on_device, self.recipe, self.dtype, self.memory_format)
        views: Tensor | Views
        if concat:
            views = source._replace(single=False).shaped(made)
        else:
            views = tuple(source.shaped(view) for view in made.chunk(self.recipe.views))
        return (views, table) if return_params else views

    def _looks_at_values(self, image: Tensor) -> bool:
        if self.check_values is None:
            return image.device.type == "cpu" and not torch.compiler.is_compiling()
        return self.check_values

    if TYPE_CHECKING:
        # nn.Module says that a call returns Any.
        __call__ = forward

    def _check_params(self, params: Tensor, images: Images) -> Tensor:
        expected = (self.recipe.views, len(images), N_COLUMNS)
        if not isinstance(params, Tensor) or params.shape != expected:
            got = tuple(params.shape) if isinstance(params, Tensor) else type(params).__name__
            raise ValueError(f"params must be a tensor of shape {expected}, got {got}")
        if not params.is_floating_point():
            raise TypeError(f"params must be floating, got {params.dtype}")
        if params.device.type == "cpu" and not torch.compiler.is_compiling():
            box = unpack(params).box
            for number, image in enumerate(images if not isinstance(images, Tensor) else ()):
                functional.check_boxes(box[:, number], image.shape[-2], image.shape[-1])
            if isinstance(images, Tensor):
                functional.check_boxes(box, images.shape[-2], images.shape[-1])
            self._check_operations(params)
        return params

    def _check_operations(self, params: Tensor) -> None:
        """Raise where a table asks for what cannot be done, instead of leaving it out."""
        if not bool(params.isfinite().all()):
            raise ValueError("params must be finite, got NaN or inf")
        p = unpack(params)
        no_order = (p.order.sort(dim=-1).values != torch.arange(4, device="cpu")).any(dim=-1)
        no_order &= p.jitter != 0
        # Read, if not followed, also where nothing is jittered.
        no_order |= ((p.order < 0) | (p.order > 3)).any(dim=-1)
        if bool(no_order.any()):
            raise ValueError(
                "params must hold each of 0, 1, 2 and 3 once in the columns of the order, "
                f"{COLUMN['order']} to {COLUMN['order'] + 3}, got {p.order[no_order][0].tolist()}"
            )
        for name in self.recipe.steps(made=False):
            asked = getattr(p, name)
            if bool(asked.any()):
                raise ValueError(
                    f"params must have 0 in column {COLUMN[name]}, as this SimCLRAugment has "
                    f"{name}=0; got another number for {int(asked.count_nonzero())} of "
                    f"{asked.numel()} views"
                )
        no_sigma = (p.blur != 0) & (p.sigma <= 0)
        if bool(no_sigma.any()):
            raise ValueError(
                f"params must hold a positive sigma in column {COLUMN['sigma']} where column "
                f"{COLUMN['blur']} asks for a blur, got {float(p.sigma[no_sigma][0])}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # What casts the weights of a model casts the views that it is fed with.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        if dtype in _DTYPES:
            self.dtype = dtype
        return self

    def __getstate__(self) -> dict[str, Any]:
        # torch.save pickles by protocol 2, which knows no torch.memory_format.
        return {**super().__getstate__(), "memory_format": str(self.memory_format)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        name = state["memory_format"].removeprefix("torch.")
        super().__setstate__({**state, "memory_format": getattr(torch, name)})

    def extra_repr(self) -> str:
        """The recipe, as ``repr`` shows it."""
        options = (
            (f.name, getattr(self.recipe, f.name), f.default) for f in fields(Recipe) if f.init
        )
        told = [f"{n}={v!r}" for n, v, default in options if v != default or n in ("size", "views")]
        return ", ".join((*told, f"dtype={self.dtype}", f"backend={self.backend!r}"))


def _check_images(images: Images) -> Tensor:
    """Return the batch, or the first of the images, if they can be augmented, else raise."""
    if isinstance(images, Tensor):
        return functional.check_images(images, channels=3)
    for image in images:
        if not isinstance(image, Tensor) or image.ndim != 3:
            got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"images in a list must be one image each, (3, H, W), got {got}")
        functional.check_images(image[None], channels=3)
        if image.dtype != images[0].dtype or image.device != images[0].device:
            raise ValueError(
                "images must have one dtype and one device, got "
                f"{images[0].dtype} on {images[0].device} and {image.dtype} on {image.device}"
            )
    return images[0]


def _check_range(images: Images) -> None:
    for part in (images,) if isinstance(images, Tensor) else images:
        if part.is_floating_point() and part.numel():
            low, high = (end.item() for end in part.detach().aminmax())
            if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
                raise ValueError(
                    f"images must lie in [0, 1], got values from {low:.4g} to {high:.4g}: divide "
                    "0...255 by 255, leave it to normalize= to normalize views, clamp(0, 1) what a "
                    "bicubic resize has left; check_values=False lets them pass"
                )
