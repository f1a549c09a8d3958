"""What DeepSpeed is told: buckets as large as what learns, a user's own settings, and a refusal of those we own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from omnisieve.config import ConfigError, LlmSection, OffloadSection
from omnisieve.training.deepspeed_settings import LARGEST_BUCKET, check_deepspeed, deepspeed_config
from omnisieve.training.distributed import Ranks
from tests.distributed.launch import run_distributed
from tests.training.runs import compressor_of, make_config, make_trainer


@pytest.mark.parametrize(("trainable", "bucket"), [(0, 1024), (2_999_999, 3_000_320), (8 * 10**9, LARGEST_BUCKET)])
def test_buckets_are_as_large_as_what_learns(tmp_path: Path, trainable: int, bucket: int):
    zero = deepspeed_config(make_config(tmp_path), trainable)["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == bucket


def test_what_a_user_sets_is_passed_on_beside_ours(tmp_path: Path):
    given = {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 7}, "wall_clock_breakdown": True}
    config = make_config(tmp_path, zero_stage=1, deepspeed=given)
    check_deepspeed(config)
    made = deepspeed_config(config, 100)
    assert made["wall_clock_breakdown"] is True
    assert made["zero_optimization"] == {
        "stage": 1,
        "overlap_comm": True,
        "reduce_bucket_size": 7,
        "allgather_bucket_size": 1024,
    }


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization\.stage cannot be set here; use .*train\.zero_stage"),
        ({"optimizer": {"type": "Adam"}}, r"optimizer\.type cannot be set here; use .*train\.lr"),
        ({"bf16": {"enabled": True}}, r"bf16\.enabled cannot be set here; use .*model\.dtype"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, r"optimizer\.device.*train\.offload"),
        ({"train_batch_size": 8}, r"train_batch_size cannot be set here; use .*micro_batch_size"),
        ({"comms_loger": {}}, r"no setting 'comms_loger'; the nearest is 'comms_logger'"),
        ({"zero_optimization": {"reduce_buckt_size": 1}}, r"reduce_buckt_size: .*is 'reduce_bucket_size'"),
        ({"zero_optimization": {"reduce_bucket_size": "much"}}, r"reduce_bucket_size: .*valid integer"),
        ({"zero_optimization": 2}, r"zero_optimization is 2; expected settings"),
        ({"zero_optimization": {"offload_param": None}}, r"offload_param is None; expected settings"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, r"reduce_bucket_size is auto.*leave it out"),
    ],
)  # fmt: skip
def test_what_is_not_the_users_is_refused_by_name(tmp_path: Path, given: dict[str, Any], told: str):
    with pytest.raises(ConfigError, match=told):
        check_deepspeed(make_config(tmp_path, deepspeed=given))


def test_what_only_a_stage_allows_is_judged_with_it(tmp_path: Path):
    given = {"zero_optimization": {"offload_optimizer": {"ratio": 0.3}}}
    offload = OffloadSection(optimizer=True)
    check_deepspeed(make_config(tmp_path, zero_stage=3, offload=offload, deepspeed=given))
    with pytest.raises(ConfigError, match=r"zero_optimization: .*only supported for ZeRO Stage 3"):
        check_deepspeed(make_config(tmp_path, zero_stage=2, offload=offload, deepspeed=given))


def train(ranks: Ranks, folder: Path, stage: int, given: dict[str, Any]) -> dict[str, Tensor]:
    trainer = make_trainer(make_config(folder, zero_stage=stage, deepspeed=given), ranks)
    trainer.fit()
    return compressor_of(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_smaller_buckets_teach_the_same(tmp_path: Path, stage: int):
    small = {"zero_optimization": {"reduce_bucket_size": 64, "allgather_bucket_size": 64}}
    own, others = (run_distributed(train, tmp_path / str(len(s)), stage, s)[0] for s in ({}, small))
    assert all((own[name] == others[name]).all() for name in own)


def test_a_whole_llm_keeps_the_largest_bucket(tmp_path: Path):
    config = make_config(tmp_path, dtype="bfloat16", llm=LlmSection("full"))
    assert deepspeed_config(config, 7 * 10**9)["zero_optimization"]["reduce_bucket_size"] == LARGEST_BUCKET
