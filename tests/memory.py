"""The memory that a step takes, as torch counts it: the same number on every machine."""

import torch
from torch.profiler import ProfilerActivity, profile


def peak_mebibytes(step):
    """The most that ``step`` holds at once on the CPU, of what it allocates itself."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events = [e for e in events if e.device_type() == torch.autograd.DeviceType.CPU]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / 2**20
