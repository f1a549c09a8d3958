"""How clips are laid out over ranks."""

import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from omnisieve.compressors import build_compressor
from omnisieve.config import DataSection, EstimatorSection, RatioSection, TrainSection
from omnisieve.data.batch import Batch
from omnisieve.data.dataset import MediaLoader
from omnisieve.data.errors import DataError
from omnisieve.data.preprocess import Preprocessor
from omnisieve.data.sizes import write_sizes
from omnisieve.layout import Modality
from omnisieve.training.reach import Reach, drawn
from omnisieve.training.streams import check_manifests, lengths_in_llm, open_streams, val_shards
from tests.data.media_files import MediaSpec, write_media
from tests.data.stock import rules, stock_processor
from tests.layouts import LayoutSpec, make_layout
from tests.training.runs import Alone


@pytest.mark.parametrize("size", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_clip_counts_once_and_ranks_keep_step(size: int, world_size: int):
    shards = [val_shards(size, 2, rank=rank, world_size=world_size) for rank in range(world_size)]
    counted = [clip for shard in shards for indices, counts in shard if counts for clip in indices]
    assert sorted(counted) == list(range(size))
    assert len({len(shard) for shard in shards}) == 1
    assert all(indices for shard in shards for indices, _ in shard)


SPECS = [LayoutSpec(windows=n, images=n % 2, audio=n != 3, text=n) for n in range(1, 7)]


@pytest.mark.parametrize(
    "ratios",
    [
        {"retained_ratio": 0.3},
        {"retained_ratio": 0.3, "audio_ratio": 0.5},
        {"video_ratio": 0.2, "audio_ratio": 0.6},
    ],
)
def test_lengths_without_decoding_are_those_of_the_budget(ratios: dict[str, float]):
    layout = make_layout(*SPECS)
    compressor = build_compressor("random", **ratios)
    modalities = ((Modality.TEXT, Modality.IMAGE), (Modality.VIDEO,), (Modality.AUDIO,))
    sizes = np.stack([layout.counts(*names) for names in modalities], axis=1)
    train = TrainSection(max_steps=1, estimator=EstimatorSection("hard_drop"))
    kept = sizes[:, 0] + compressor.budget(layout).total
    np.testing.assert_allclose(lengths_in_llm(sizes, compressor.settings, train), kept, atol=1)
    train.estimator = EstimatorSection("masked", 0.25)
    candidates = 0.25 * (sizes.sum(axis=1) - kept)
    np.testing.assert_allclose(lengths_in_llm(sizes, compressor.settings, train), kept + candidates, atol=1)
    train.estimator, train.ratio = EstimatorSection("hard_drop"), RatioSection(0.1, 0.5)
    drawn = sizes[:, 0] + 0.3 * sizes[:, 1:].sum(axis=1)
    np.testing.assert_allclose(lengths_in_llm(sizes, compressor.settings, train), drawn)


def line(index: int) -> str:
    """A conversation without media that grows with its index."""
    messages = [{"role": "user", "content": "Why? " * index}, {"role": "assistant", "content": "So."}]
    return json.dumps({"id": f"{index}", "messages": messages}) + "\n"


def test_the_batches_of_a_step_are_grouped_by_length(tmp_path: Path):
    manifest, sizes = tmp_path / "m.jsonl", tmp_path / "sizes.jsonl"
    manifest.write_text("".join(map(line, range(12))))
    media = MediaLoader(Preprocessor(stock_processor(), rules()))
    compressor = build_compressor("random", retained_ratio=0.5)
    data = DataSection(train=str(manifest), workers=0)

    def step(**train: object) -> list[Batch]:
        section = TrainSection(max_steps=1, micro_batch_size=2, gradient_accumulation_steps=4, **train)
        check_manifests(data, section)
        return list(itertools.islice(open_streams(data, section, media, compressor, Alone()).train, 4))

    plain = step()
    write_sizes(sizes, manifest, media.preprocessing(""), [[20 + 5 * index, 0, 0] for index in range(12)])
    grouped = step(group_by_length=str(sizes))
    ids = [int(id) for batch in grouped for id in batch.ids]
    assert ids == sorted((int(id) for batch in plain for id in batch.ids), reverse=True)
    assert sum(batch.input_ids.numel() for batch in grouped) < sum(batch.input_ids.numel() for batch in plain)
    longest = int(max(batch.attention_mask.sum(dim=1).max() for batch in plain))
    data.max_tokens = longest - 1
    limited = step(group_by_length=str(sizes))
    assert all(batch.attention_mask.sum(dim=1).max() < longest for batch in limited)
    assert {bad.kind for batch in limited for bad in batch.failures} == {"too_long"}
    manifest.write_text("".join(map(line, range(13))))
    with pytest.raises(DataError, match="another manifest"):
        step(group_by_length=str(sizes))


def clip_line(id: str, name: str) -> str:
    messages = [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "A clip."}]
    return json.dumps({"id": id, "messages": messages, "videos": [name]}) + "\n"


@pytest.mark.parametrize("ratio", [RatioSection(), RatioSection(0.3, 0.45)])
def test_a_sample_that_cannot_have_its_ratio_is_replaced(tmp_path: Path, ratio: RatioSection):
    """Long sound beside a single frame, where half of the sound is to stay and less than half of everything."""
    write_media(tmp_path / "long.mp4", MediaSpec(seconds=0.3, audio_seconds=20))
    write_media(tmp_path / "short.mp4", MediaSpec(seconds=5.0, audio_seconds=0.3))
    names = ["short", "long", "short", "short", "long"]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(clip_line(str(i), f"{name}.mp4") for i, name in enumerate(names)))
    media = MediaLoader(Preprocessor(stock_processor(), rules(), min_pixels=56 * 56, max_pixels=56 * 56))
    fixed = {} if ratio.min else {"audio_ratio": 0.5}
    compressor = build_compressor("omnisift", hidden_size=16, width=16, heads=2, retained_ratio=0.4, **fixed)
    data = DataSection(train=str(manifest), val=str(manifest), workers=0)
    section = TrainSection(max_steps=1, micro_batch_size=5, ratio=ratio)
    streams = open_streams(data, section, media, compressor, Alone())
    assert streams.val is not None
    for batch in (next(iter(streams.train)), next(iter(streams.val))[0]):
        assert len(batch.ids) == 5
        compressor.budget(batch.layout)
        # A drawn ratio holds for both modalities, so there is nothing that it cannot have.
        bad = {failure.id: failure for failure in batch.failures}
        assert set(bad) == (set() if ratio.min else {"1", "4"})
        assert all("sample" in failure.reason and "reachable are" in failure.reason for failure in bad.values())
        assert {failure.kind for failure in bad.values()} <= {"unreachable"}
    media.reader.close()


def test_both_ends_of_a_drawn_ratio_are_asked():
    compressor = build_compressor("omnisift", hidden_size=16, width=16, heads=2, retained_ratio=0.4)
    assert drawn(compressor, RatioSection()) == (compressor,)
    assert [c.settings.retained_ratio for c in drawn(compressor, RatioSection(0.2, 0.6))] == [0.2, 0.6]
    reach = Reach(drawn(compressor, RatioSection(0.2, 0.6)), ids_per_window=50)
    assert all(p.device.type == "meta" for asked in reach._compressors for p in asked.parameters())
    assert all(p.device.type == "cpu" for p in compressor.parameters())
    pickle.dumps(reach)
