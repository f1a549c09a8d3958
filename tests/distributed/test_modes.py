"""LLM frozen, with adapters or learning as a whole, at every ZeRO stage, on one and on two ranks of DeepSpeed.

Runs of a mode that must be equal: however clips are spread over ranks and micro-batches, whatever is sharded or
offloaded, and wherever a run is cut and resumed.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omnisieve.backbones.tuning import trainable
from omnisieve.config import EstimatorSection, LlmSection, LoraSection, OffloadSection, RatioSection, WarmStartSection
from omnisieve.data.sampler import StreamSampler
from omnisieve.trained_llm import has_tuned_llm, read_tuned_llm
from omnisieve.training import CheckpointError, Trainer
from omnisieve.training.checkpoint import BEST, LAST
from omnisieve.training.distributed import Ranks
from omnisieve.training.engine import collect
from tests.distributed.launch import run_distributed
from tests.models import tiny_thinker
from tests.training.batches import CLIPS
from tests.training.runs import make_config, make_trainer

MODES = ("frozen", "lora", "full")
STAGES = (1, 2, 3)
STEPS, UNREADABLE = 6, frozenset({5})
EPOCH = len(CLIPS) // 2  # steps, of two clips each
# The same eight clips in one step.
SPREADS = {1: {"batch of 8": (8, 1), "8 accumulations": (1, 8)}, 2: {"4 each": (4, 1), "2 x 2 each": (2, 2)}}

SHARES = (1.0, 0.5)  # of dropped tokens that stay as candidates
VARIANTS: dict[str, dict[str, Any]] = {
    "recomputed": {"gradient_checkpointing": True},
    "distilled": {"distill_weight": 0.5},
    "sampled": {"estimator": EstimatorSection("masked", 0.5), "ratio": RatioSection(0.2, 0.6)},
    "dropped": {"estimator": EstimatorSection("hard_drop")},
    "warmed up": {"init_from": "fastv_om", "warm_start": WarmStartSection(1, {"k": 1})},
}

pytestmark = pytest.mark.slow


def cuts() -> dict[str, int]:
    """Steps after which a run is cut."""
    sampler = StreamSampler(len(CLIPS), 2)
    replaced = next(p for p in range(2 * STEPS) if sampler.sample(p) in UNREADABLE) // 2 + 1
    found = {"mid-epoch": 2, "epoch end": EPOCH, "after a replaced sample": replaced}
    assert len(set(found.values())) == len(found)
    return found


def config_of(folder: Path, mode: Any, stage: int, **train: Any) -> Any:
    """Of a run whose adapters drop values at random, from each rank's own generator."""
    lora = LoraSection(rank=4, dropout=0.1 if "resume" in train or "save_every" in train else 0.0)
    return make_config(folder, zero_stage=stage, llm=LlmSection(mode, lr=1e-3, lora=lora), **train)


def run(ranks: Ranks, folder: Path, mode: str, stage: int, **train: Any) -> Trainer:
    torch.manual_seed(1 + ranks.rank)
    trainer = make_trainer(config_of(folder, mode, stage, **train), ranks, UNREADABLE)
    trainer.fit()
    return trainer


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Every trainable, whole."""
    learning = dict(trainer.module.compressor.named_parameters()) | trainable(trainer.module.adapter)
    return collect(learning, keep=True)


def first_moments(trainer: Trainer) -> list[Tensor]:
    """This rank's shard of Adam's first moment after one step, by parameter group: the gradient, times 0.1."""
    optimizer = trainer.engine.optimizer.optimizer
    return [optimizer.state[group["params"][0]]["exp_avg"].clone() for group in optimizer.param_groups]


def job(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """All runs of one number of ranks: starting processes costs more than the runs."""
    found: dict[str, Any] = {}
    for mode, (name, (size, accumulate)) in product(MODES, SPREADS[ranks.world_size].items()):
        spread = {"micro_batch_size": size, "gradient_accumulation_steps": accumulate}
        for candidates in SHARES:
            options = {**spread, "estimator": EstimatorSection("masked", candidates), "max_grad_norm": 1e9}
            trainer = run(ranks, folder / f"{mode} {name} {candidates}", mode, 2, max_steps=1, **options)
            found[mode, name, candidates] = first_moments(trainer)
    if ranks.world_size == 1:
        return found
    for mode, stage in product(MODES, STAGES):
        run(ranks, folder / f"{mode} {stage}", mode, stage, max_steps=3, eval_every=3)
        offload = OffloadSection(optimizer=True, parameters=stage == 3)
        run(ranks, folder / f"{mode} {stage} offloaded", mode, stage, max_steps=3, eval_every=3, offload=offload)
        trainer = run(ranks, folder / f"{mode} {stage} bfloat16", mode, stage, max_steps=2)
        found[mode, stage, "buffers"] = {name: value.clone() for name, value in trainer.module.named_buffers()}
    for mode, stage, (name, options) in product(MODES, (1, 3), VARIANTS.items()):
        run(ranks, folder / f"{mode} {stage} {name}", mode, stage, max_steps=3, eval_every=2, **options)
    for mode, stage in product(MODES, (2, 3)):
        options = {"max_steps": STEPS, "eval_every": 3, "save_every": 1, "save_total_limit": STEPS}
        whole = folder / f"{mode} {stage} whole"
        found[mode, stage, "whole"] = state_of(run(ranks, whole, mode, stage, **options))
        for cut, step in cuts().items():
            resume = str(whole / "checkpoints" / f"checkpoint-{step}")
            resumed = run(ranks, folder / f"{mode} {stage} {cut}", mode, stage, **options, resume=resume)
            found[mode, stage, cut] = state_of(resumed)
    found["other stage"] = refusal(ranks, folder / "full 2 whole" / "checkpoints" / "checkpoint-6", folder / "other")
    return found


def refusal(ranks: Ranks, checkpoint: Path, folder: Path) -> str:
    """What a run at another ZeRO stage says of a checkpoint."""
    try:
        run(ranks, folder, "full", 1, max_steps=STEPS, eval_every=3, save_every=1, resume=str(checkpoint))
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, list[dict[Any, Any]]]]:
    folders = {size: tmp_path_factory.mktemp(f"modes{size}") for size in (1, 2)}
    return {size: (folder, run_distributed(job, folder, world_size=size)) for size, folder in folders.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("candidates", SHARES)
def test_gradient_does_not_depend_on_how_clips_are_spread(results, mode: str, candidates: float):
    reference = gradient(results[1][1], (mode, "batch of 8", candidates))
    for size, spreads in SPREADS.items():
        for name in spreads:
            error = gradient(results[size][1], (mode, name, candidates)) - reference
            assert error.norm() < 1e-4 * reference.norm(), name


def gradient(ranks: list[dict[Any, Any]], key: tuple[str, str, float]) -> Tensor:
    """The whole gradient of a first step, from all ranks' shards; zeros of alignment cut off."""
    groups = [torch.cat(shards) for shards in zip(*(rank[key] for rank in ranks), strict=True)]
    return torch.cat([group[: int(group.nonzero().max()) + 1] for group in groups]) / 0.1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("place", ["", " offloaded"])
def test_log_does_not_depend_on_what_is_sharded_or_offloaded(results, mode: str, stage: int, place: str):
    reference = read_log(results[2][0] / f"{mode} 1")
    assert len(reference) == 4  # steps and a validation
    for record, expected in zip(read_log(results[2][0] / f"{mode} {stage}{place}"), reference, strict=True):
        assert record == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_log_of_a_variant_does_not_depend_on_what_is_sharded(results, mode: str, variant: str):
    reference, sharded = (read_log(results[2][0] / f"{mode} {stage} {variant}") for stage in (1, 3))
    for record, expected in zip(sharded, reference, strict=True):
        assert record == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_recomputing_layers_changes_no_log(results, mode: str):
    stored, recomputed = (read_log(results[2][0] / f"{mode} 1{name}")[:2] for name in ("", " recomputed"))
    for record, expected in zip(recomputed, stored, strict=True):
        assert record == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_stages_agree_beside_a_bfloat16_llm(results, mode: str):
    first, *others = (read_log(results[2][0] / f"{mode} {stage} bfloat16")[0] for stage in STAGES)
    for record in others:
        assert record["train/loss"] == pytest.approx(first["train/loss"], rel=1e-3)
        assert record["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", STAGES)
def test_rotary_frequencies_stay_float32(results, mode: str, stage: int):
    expected = {f"backbone.{name}": value for name, value in tiny_thinker().named_buffers()}
    for rank in results[2][1]:
        found = rank[mode, stage, "buffers"]
        torch.testing.assert_close({name: found[name] for name in expected}, expected, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("cut", cuts())
def test_resumed_is_uninterrupted(results, mode: str, stage: int, cut: str):
    folder, ranks = results[2]
    for rank in ranks:
        torch.testing.assert_close(rank[mode, stage, cut], rank[mode, stage, "whole"], rtol=0, atol=0)
    whole, resumed = (read_log(folder / f"{mode} {stage} {name}") for name in ("whole", cut))
    assert resumed == [record for record in whole if record["step"] > cuts()[cut]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_replaced_sample_is_reported_once(results, mode: str, stage: int):
    lines = (results[2][0] / f"{mode} {stage} whole" / "bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"clip {clip}" for clip in UNREADABLE]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_holds_what_learns_and_no_more(results, mode: str, stage: int):
    folder, ranks = results[2]
    learning = sum(value.numel() for value in ranks[0][mode, stage, "whole"].values())
    files = (folder / f"{mode} {stage} whole" / "checkpoints" / "checkpoint-6").rglob("*")
    assert sum(path.stat().st_size for path in files if path.is_file()) < 20 * learning + 2**20


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", [2, 3])
def test_an_export_holds_what_was_trained(results, mode: str, stage: int):
    folder, ranks = results[2]
    trained = ranks[0][mode, stage, "whole"]
    last = folder / f"{mode} {stage} whole" / LAST
    assert has_tuned_llm(last) == (mode != "frozen")
    assert has_tuned_llm(last.with_name(BEST)) == (mode != "frozen")
    if mode != "frozen":
        tensors = read_tuned_llm(last).tensors
        torch.testing.assert_close(dict(tensors), {name: trained[name] for name in tensors}, rtol=0, atol=0)
        assert len(tensors) > 20


def test_another_zero_stage_is_refused(results):
    assert "train.zero_stage was 2, is 1" in results[2][1][0]["other stage"]


def test_rates_of_llm_and_compressor_are_their_own(results):
    for mode in MODES:
        record = read_log(results[2][0] / f"{mode} 2")[0]
        assert record["lr/compressor"] == pytest.approx(1e-2)
        assert record.get("lr/llm") == (None if mode == "frozen" else pytest.approx(1e-3))


def read_log(folder: Path) -> list[dict[str, float]]:
    """Records of a run without its times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k and "memory" not in k} for line in lines]
