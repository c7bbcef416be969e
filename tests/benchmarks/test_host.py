"""The time of the host is that of what a GPU would be given."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", minversion="3.5")

CODE = """
import json
from benchmarks import host
results = [host.measure(case, None, None) for case in host.cases("cpu", quick=True) * 2]
clip = host.measure(host.Case("CLIP", 128, "bfloat16", budget_s=0), None, None)
print(json.dumps([*results, clip]))
"""


@pytest.mark.slow
def test_all_that_a_step_launches_is_counted_whatever_was_measured_before():
    # Triton's interpreter and its compiler do not share a process, nor may tests get its driver.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], check=False, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    first, again, clip = json.loads(done.stdout.splitlines()[-1])
    assert first["launches"] == again["launches"] == {"triton": 5, "torch": 1}
    assert clip["launches"]["triton"] == 12
    assert all(x["median"] > 0 for x in (*first["microseconds"].values(), clip["of_eager"]))
