"""Memory of this process, of its accelerator and of its machine, in GiB."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_GIB = 2**30


def memory(device: torch.device) -> dict[str, float]:
    """What is in use; nothing waits for the device.

    Returns:
        "process": resident on the host. "machine_free": what its programs could still get. Of an accelerator:
        "allocated" by tensors, "reserved" by torch, and "peak" of what was allocated since the last call.
    """
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    found = {"process": float(resident), "machine_free": 1024.0 * int(lines["MemAvailable"].split()[0])}
    if device.type != "cpu":
        counters = torch.get_device_module(device)
        found["allocated"] = counters.memory_allocated(device)
        found["reserved"] = counters.memory_reserved(device)
        found["peak"] = counters.max_memory_allocated(device)
        counters.reset_peak_memory_stats(device)
    return {name: size / _GIB for name, size in found.items()}
