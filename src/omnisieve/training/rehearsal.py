"""`train.py --dry-run`: one step as a run would do it, and what the run will need."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Mapping

import torch

from omnisieve.config import TrainConfig
from omnisieve.training.estimate import estimate, sizes_of, table
from omnisieve.training.memory import memory
from omnisieve.training.meter import quality
from omnisieve.training.trainer import Trainer

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
RANKS = (1, 2, 4, 8, 16, 32, 64)


def rehearse(trainer: Trainer, config: TrainConfig, before: float) -> str:
    """Do one step and leave no checkpoint, log or export; then say what it met.

    Args:
        trainer: of the run, not yet started; it cannot be used again.
        config: of the run.
        before: GiB that this process took before anything was loaded.

    Returns:
        lines to print: the batch, the loss, times, and the memory of a rank for several numbers of ranks.

    Raises:
        TrainingError: the step has nothing to learn from, or is not finite.
    """
    if trainer.engine.device.type == "cpu":
        return_freed_memory()
    start = time.perf_counter()
    window, sums = trainer.rehearse()
    seconds = time.perf_counter() - start
    sizes = sizes_of(trainer.module, max(window, key=lambda batch: batch.layout.length), config)
    device = trainer.engine.device
    measured = peak_bytes(device, before)
    expected = estimate(config, sizes, trainer.world_size).device
    lines = [
        f"One step of {len(window)} forwards a rank in {seconds:.1f} s, which includes decoding and all first starts.",
        "",
        f"text and images   {sums['other']:>14,.0f} tokens",
        f"video             {sums['video']:>14,.0f} tokens, {sums['kept_video']:,.0f} kept",
        f"audio             {sums['audio']:>14,.0f} tokens, {sums['kept_audio']:,.0f} kept",
        *answers(sums),
        f"trainable         {sizes.trainable:>14,} parameters",
        f"frozen            {sizes.frozen:>14,} parameters",
        "",
        f"Memory of a rank in GiB, estimated for forwards of {sizes.tokens:,} tokens in the LLM, the longest one here",
        "(what is kept, and the candidates of the masked route):",
        *table(config, sizes, RANKS, device_bytes(device)),
        f"Measured in this step on the first rank: {measured / 2**30:.2f} GiB at its peak"
        + (f", beside {before:.2f} GiB of libraries" if device.type == "cpu" else "")
        + f"; estimated {expected / 2**30:.2f}.",
    ]
    return "\n".join(lines)


def return_freed_memory() -> None:
    """From now on large blocks go back to the system when they are freed, so that what is resident is what is used.

    glibc keeps blocks of up to 32 MB for later and scatters small ones among them: a gigabyte at 3B. Returning them
    costs time, so a run itself does not.
    """
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20)


def peak_bytes(device: torch.device, before: float) -> int:
    """The most that was ever allocated; on a CPU, that was resident beyond the `before` GiB of the start."""
    if device.type == "cpu":
        return round((memory(device)["process_peak"] - before) * 2**30)
    return int(torch.get_device_module(device).max_memory_allocated(device))


def answers(sums: Mapping[str, float]) -> list[str]:
    """What the step learned from; a warm start learns from clips alone."""
    if "answers" not in sums:
        return []
    loss = quality(sums)["loss"]
    return [
        f"answers           {sums['answer_tokens']:>14,.0f} tokens in {sums['answers']:,.0f}, loss {loss:.3f} a token"
    ]


def device_bytes(device: torch.device) -> int:
    """Memory of an accelerator; on a CPU that of the machine, which its ranks share."""
    if device.type == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(torch.get_device_module(device).get_device_properties(device).total_memory)
