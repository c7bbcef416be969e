"""The projection head of SimCLR: what maps the representation to the space of the loss."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from contrastive_kit._checks import check_flag, check_int

MAX_LAYERS = 3


class ProjectionHead(nn.Module):
    r"""Projection head :math:`z = g(h)`: no layer, a linear map, or a small MLP.

    The loss is computed on ``z``; downstream tasks use ``h``, the input of the head, which is more
    than ten points better under linear evaluation (SimCLR, section 4.2).

    ==========  ===================================  ============================
    ``layers``  structure                            where it comes from
    ==========  ===================================  ============================
    0           identity                             "None" in SimCLR, Figure 8
    1           Linear, BN                           "Linear" in SimCLR, Figure 8
    2           Linear, BN, ReLU, Linear, BN         SimCLR (v1)
    3           (Linear, BN, ReLU) × 2, Linear, BN   SimCLR v2
    ==========  ===================================  ============================

    Where normalization and biases go follows the authors' code, not the bias-free formula in
    the paper, :math:`g(h) = W^{(2)} \max(0, W^{(1)} h)`:

    - with batch normalization, every linear layer is followed by it, *the last one included*; no
      linear layer has a bias (BN removes it), hidden BN layers have a scale and a shift, the last
      BN layer a scale only;
    - without, hidden layers have a bias and the last layer has none.

    Args:
        in_dim: Size of the representation ``h``.
        hidden_dim: Width of the hidden layers; default ``in_dim``. Only for 2 and 3 layers.
        out_dim: Size of the embedding ``z``. With ``layers=0`` it has to equal ``in_dim``.
        layers: Number of linear layers, 0 to 3.
        batch_norm: Whether batch normalization follows each linear layer. Without a linear layer
            there is nothing to normalize.

    Raises:
        TypeError: A size or ``layers`` is not an integer, ``batch_norm`` not True or False.
        ValueError: A size below 1, ``layers`` outside 0 … 3, ``hidden_dim`` given where there is no
            hidden layer, ``layers=0`` with ``out_dim != in_dim``; in the forward pass an input
            that is not (N, ``in_dim``).

    Shape:
        Input (N, ``in_dim``), output (N, ``out_dim``), not L2-normalized: the losses do that.

    References:
        SimCLR, https://arxiv.org/abs/2002.05709, sections 2.1 and 4.2;
        SimCLR v2, https://arxiv.org/abs/2006.10029, section 2.

    Example:
        >>> import torch
        >>> from contrastive_kit import ProjectionHead
        >>> head = ProjectionHead(512, out_dim=128)
        >>> head(torch.randn(8, 512)).shape
        torch.Size([8, 128])
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int | None = None,
        out_dim: int = 128,
        *,
        layers: int = 2,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        layers = check_int("layers", layers)
        if not 0 <= layers <= MAX_LAYERS:
            raise ValueError(f"layers must be from 0 to {MAX_LAYERS}, got {layers}")
        if hidden_dim is not None and layers < 2:
            raise ValueError(
                f"hidden_dim must be None where there is no hidden layer (layers={layers}), "
                f"got {hidden_dim}"
            )
        in_dim, out_dim = check_int("in_dim", in_dim, 1), check_int("out_dim", out_dim, 1)
        hidden_dim = in_dim if hidden_dim is None else check_int("hidden_dim", hidden_dim, 1)
        check_flag("batch_norm", batch_norm)
        if layers == 0 and out_dim != in_dim:
            raise ValueError(
                f"out_dim must equal in_dim ({in_dim}) with layers=0, which is the identity; "
                f"got {out_dim}"
            )

        self.in_dim = in_dim
        self.out_dim = out_dim
        widths = [in_dim, *[hidden_dim] * (layers - 1), out_dim]
        modules: list[nn.Module] = []
        for i in range(layers):
            last = i == layers - 1
            modules.append(nn.Linear(widths[i], widths[i + 1], bias=not (last or batch_norm)))
            if batch_norm:
                norm = nn.BatchNorm1d(widths[i + 1])
                if last:
                    norm.register_parameter("bias", None)
                modules.append(norm)
            if not last:
                modules.append(nn.ReLU(inplace=True))
        self.net: nn.Sequential = nn.Sequential(*modules)

    def forward(self, h: Tensor) -> Tensor:
        """Map representations (N, ``in_dim``) to embeddings (N, ``out_dim``)."""
        if h.ndim != 2 or h.shape[1] != self.in_dim:
            raise ValueError(f"h must have shape (N, {self.in_dim}), got {tuple(h.shape)}")
        z: Tensor = self.net(h)
        return z

    if TYPE_CHECKING:
        # nn.Module says that a call returns Any.
        __call__ = forward
