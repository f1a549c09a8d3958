"""Memory of this process, of its accelerator and of its machine, in GiB."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

_GIB = 2**30


def memory(device: torch.device) -> dict[str, float]:
    """What is in use; nothing waits for the device.

    Returns:
        "process": resident on the host, and "process_peak", the most that ever was. "machine_free": what the machine's
        programs could still get. Of an accelerator: "allocated" by tensors, "reserved" by torch, and "peak" of what was
        allocated since the last call.
    """
    own, machine = _table("/proc/self/status"), _table("/proc/meminfo")
    found = {"process": own("VmRSS"), "process_peak": own("VmHWM"), "machine_free": machine("MemAvailable")}
    if device.type != "cpu":
        counters = torch.get_device_module(device)
        found["allocated"] = counters.memory_allocated(device)
        found["reserved"] = counters.memory_reserved(device)
        found["peak"] = counters.max_memory_allocated(device)
        counters.reset_peak_memory_stats(device)
    return {name: size / _GIB for name, size in found.items()}


def _table(path: str) -> Callable[[str], float]:
    """Looks up entries of a table of the kernel's, in bytes."""
    lines = dict(line.split(":", 1) for line in Path(path).read_text().splitlines())
    return lambda name: 1024.0 * int(lines[name].split()[0])
