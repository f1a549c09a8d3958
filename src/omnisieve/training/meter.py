"""Sums over many micro-batches, read off the device once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from omnisieve.data.batch import Batch
from omnisieve.layout import Modality
from omnisieve.training.clock import Clock
from omnisieve.training.distributed import Ranks


class Meter:
    """Adds up what forwards report; device values stay on the device until `read`."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._device: dict[str, Tensor] = {}
        self._host: dict[str, float] = {}

    def add(self, outputs: Mapping[str, Tensor], batch: Batch, *, weight: float = 1.0) -> None:
        """Count one forward of `TrainingModule` on this rank, or with weight 0 only its names."""
        for name, value in outputs.items():
            # In float64 the sums are exact for counts, whatever their number.
            value = value.detach().double() * weight
            self._device[name] = self._device[name] + value if name in self._device else value
        video, audio, other = (
            float(batch.layout.counts(*kinds).sum())
            for kinds in ((Modality.VIDEO,), (Modality.AUDIO,), (Modality.TEXT, Modality.IMAGE))
        )
        counts = {"answer_tokens": sum(batch.answer_tokens), "video": video, "audio": audio, "other": other}
        for name, count in counts.items():
            self._host[name] = self._host.get(name, 0.0) + weight * count

    def read(self) -> dict[str, float]:
        """Sums over all micro-batches and ranks since the last read, none without any; waits for the device once."""
        if not self._host:
            return {}
        names = [*self._device, *self._host]
        values = [*torch.stack(list(self._device.values())).tolist(), *self._host.values()]
        self._device, self._host = {}, {}
        return dict(zip(names, self._ranks.sum(values), strict=True))


def quality(sums: Mapping[str, float]) -> dict[str, float]:
    """Means over answers: loss terms per token, accuracies in percent.

    Of a warm start: the mean loss of a clip, and how much of what is kept the teacher would keep, in percent.
    """
    if "order" in sums:
        return {
            "order_loss": sums["order"] / max(sums["clips"], 1.0),
            "agreement": 100 * sums["agreeing"] / max(sums["chosen"], 1.0),
        }
    tokens, answers = max(sums["answer_tokens"], 1.0), max(sums["answers"], 1.0)
    return {
        "loss": sums["objective"] / tokens,
        "cross_entropy": sums["cross_entropy"] / tokens,
        "divergence": sums["divergence"] / tokens,
        "token_accuracy": 100 * sums["correct_tokens"] / tokens,
        "answer_accuracy": 100 * sums["correct_answers"] / answers,
    }


def progress(sums: Mapping[str, float]) -> str:
    """What a progress bar says."""
    means = quality(sums)
    if "agreement" in means:
        return f"warm start: loss {means['order_loss']:.3f}, agrees {means['agreement']:.1f} %"
    return f"loss {means['loss']:.3f}, right {means['answer_accuracy']:.1f} %"


def ratios(sums: Mapping[str, float]) -> dict[str, float]:
    """Measured retained ratios; a modality that did not occur has none."""
    kept = {"video": sums["kept_video"], "audio": sums["kept_audio"]}
    kept["total"] = kept["video"] + kept["audio"]
    available = {"video": sums["video"], "audio": sums["audio"], "total": sums["video"] + sums["audio"]}
    return {name: kept[name] / available[name] for name in kept if available[name]}


def record(sums: Mapping[str, float], clock: Clock, memory: Mapping[str, float]) -> dict[str, float]:
    """Scalars of the steps that were summed up, by the names they have in the log; waits for the device.

    Args:
        sums: that a meter read.
        clock: that timed the same steps.
        memory: in GiB, see `memory.memory`.
    """
    before, after = tokens(sums)
    return {
        **{f"train/{name}": value for name, value in quality(sums).items()},
        **{f"ratio/{name}": value for name, value in ratios(sums).items()},
        "tokens_per_second/before_compression": before / clock.run_seconds,
        "tokens_per_second/after_compression": after / clock.run_seconds,
        **{f"seconds/{lap}": value for lap, value in clock.read().items()},
        **{f"memory_gib/{name}": value for name, value in memory.items()},
    }


def tokens(sums: Mapping[str, float]) -> tuple[float, float]:
    """Tokens of the sequences before and after compression."""
    before = sums["video"] + sums["audio"] + sums["other"]
    return before, sums["kept_video"] + sums["kept_audio"] + sums["other"]
