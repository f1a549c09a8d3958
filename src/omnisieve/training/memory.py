"""Memory of this process, of its accelerator and of its machine, in GiB."""

from __future__ import annotations

import os
import resource
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
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    machine = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    found = {
        "process": float(resident),
        "process_peak": _peak(),
        "machine_free": 1024.0 * int(machine["MemAvailable"].split()[0]),
    }
    if device.type != "cpu":
        counters = torch.get_device_module(device)
        found["allocated"] = counters.memory_allocated(device)
        found["reserved"] = counters.memory_reserved(device)
        found["peak"] = counters.max_memory_allocated(device)
        counters.reset_peak_memory_stats(device)
    return {name: size / _GIB for name, size in found.items()}


def _peak() -> float:
    """The most that this process ever had resident, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    own = next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
    # Not every kernel has that line; the count below also knows what the process was before it became this program.
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if own is None else own
