"""What results are computed in."""

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32: half precision is never computed in."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
