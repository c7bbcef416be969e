"""The loss of one's own in docs/choosing_a_loss.md does what the page says."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

PAGE = Path(__file__).parents[2] / "docs/choosing_a_loss.md"


@pytest.fixture
def margin_nt_xent():
    (block,) = [x for x in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "def" in x]
    names = {}
    exec(block, names)
    assert names["z1"].grad_fn is not None or names["z1"].requires_grad
    return names["margin_nt_xent"]


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_the_loss_of_the_page_equals_a_cross_entropy(margin, margin_nt_xent):
    n, temperature = 7, 0.2
    views = torch.randn(2, n, 5, dtype=torch.float64, requires_grad=True)
    u = F.normalize(views.flatten(0, 1), dim=1)
    logits = u @ u.T
    positive = torch.arange(2 * n).roll(n)
    logits = logits - margin * F.one_hot(positive)
    logits = (logits / temperature).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    expected = F.cross_entropy(logits, positive)
    actual = margin_nt_xent(*views, temperature=temperature, margin=margin)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, views), torch.autograd.grad(expected, views)
    )
