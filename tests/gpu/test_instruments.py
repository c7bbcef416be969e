"""The instruments of the benchmarks on a GPU: clock, memory, launches, graphs."""

import pytest
import torch

from benchmarks.harness.device import Device

pytestmark = pytest.mark.gpu


def test_the_instruments(cuda):
    device = Device("cuda")
    x = torch.randn(1024, 1024, device=cuda)
    assert device.launches(lambda: x.exp().sin()) == {"kernels": 2, "copies": 0}
    assert device.extra_mib(lambda: x + 1) == pytest.approx(4, abs=0.1)
    assert device.extra_mib(lambda: x.add_(1)) == pytest.approx(0, abs=0.1)
    replay, result = device.graphed(lambda: x * 2)
    x.fill_(3)
    replay()
    assert result.eq(6).all()
    product, flops = device.product(8192, 8192)
    once, several = device.seconds(product, 1), device.seconds(product, 5)
    assert once == pytest.approx(several, rel=0.5)
    assert 1e11 < flops / several < 1e15
