"""Error of the float32 loss and its gradient against float64, ours beside eager."""

import statistics
from typing import Any

from benchmarks.loss_arms import NT_XENT, OURS, embeddings
from benchmarks.parity import oracle, relative_errors

# Views as similar as the nearest strangers: losses neither saturate nor vanish at any temperature.
_NOISE = 1.5

TEMPERATURES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002)


def gradient_budget(temperature: float) -> float:
    """The relative error that the gradient may have in float32."""
    return max(1e-6, 2e-7 / temperature)


def measure(n: int = 256, d: int = 128, seeds: int = 5) -> list[dict[str, Any]]:
    """For each temperature the median and the largest relative error over ``seeds`` batches."""
    results = []
    for temperature in TEMPERATURES:
        row: dict[str, Any] = {"temperature": temperature, "n": n, "d": d, "seeds": seeds}
        batches = [embeddings(n, d, seed, _NOISE) for seed in range(seeds)]
        expected = [oracle("nt_xent", *z, temperature) for z in batches]
        for name in (OURS, "eager"):
            loss = NT_XENT[name].build(temperature)
            errors = [relative_errors(loss, *z, o) for z, o in zip(batches, expected, strict=True)]
            for part, values in zip(("loss", "gradient"), zip(*errors, strict=True), strict=True):
                row.setdefault(name, {})[part] = {
                    "median": statistics.median(values),
                    "largest": max(values),
                }
        results.append(row)
    return results
