"""How wrong a result may be, in one place: relative L2 error against float64."""

import torch

# Logsumexps and losses, as multiples of their size.
VALUE = {
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    torch.bfloat16: 1e-6,  # computed in float32 from the embeddings as given
    torch.float16: 1e-6,
}


def gradient_budget(dtype: torch.dtype, temperature: float) -> float:
    """Logits of size 1 / temperature carry the rounding of their dtype into the exponential."""
    if dtype == torch.float64:
        return max(1e-13, 1e-15 / temperature)
    if dtype == torch.float32:
        return max(1e-6, 2e-7 / temperature)
    # A gradient in half precision is rounded once, at the end.
    return {torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """L2 error relative to the expected result, in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def assert_within(actual: torch.Tensor, expected: torch.Tensor, budget: float) -> None:
    """Assert the same shape, finite values and a relative error within ``budget``."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert torch.isfinite(actual).all()
    assert float(expected.detach().double().norm()) > 0, "an all-zero oracle proves nothing"
    error = relative_error(actual, expected)
    assert error <= budget, f"relative error {error:.3g} exceeds {budget:.3g}"
