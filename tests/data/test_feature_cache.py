from __future__ import annotations

import errno
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from omnisieve.data import feature_shards
from omnisieve.data.batch import Features
from omnisieve.data.collate import collate
from omnisieve.data.dataset import MediaLoader
from omnisieve.data.feature_cache import FeatureCache, FeatureCacheError, media_key
from omnisieve.data.feature_shards import Origin
from omnisieve.data.feature_writer import FeatureCacheWriter
from omnisieve.data.manifest import Conversation, MediaPart
from omnisieve.data.media import MediaError
from omnisieve.data.preprocess import Preprocessor
from omnisieve.data.tokens import AudioRun, VideoRun
from omnisieve.layout import Modality
from tests.data.stock import rules, stock_processor

SETTINGS = {"fps": 2.0, "max_frames": None, "size": (1, 2), "weights": "abc"}
VIDEO = VideoRun((2, 4, 4), 1.0, 30)
STATISTIC = "audio/attention"


def part(folder: Path, name: str, content: str, kind: str = "video") -> MediaPart:
    (folder / name).write_text(content)
    return MediaPart(kind, folder / name)


def features(seed: int, video: int = 8, audio: int = 30) -> Features:
    generator = torch.Generator().manual_seed(seed)
    deepstack = {"video/deepstack.0": torch.randn(video, 16, generator=generator)} if video else {}
    return Features(
        video=torch.randn(video, 16, generator=generator) if video else None,
        audio=torch.randn(audio, 16, generator=generator) if audio else None,
        extra={STATISTIC: torch.rand(audio, generator=generator), **deepstack},
    )


def open_writer(
    folder: Path, settings: Mapping[str, Any] = SETTINGS, stored: str = "float32", **options: Any
) -> FeatureCacheWriter:
    origin = Origin(settings, encoded="float32", stored=stored)
    return FeatureCacheWriter(folder / "cache", origin, statistics=[STATISTIC], **options)


def write(folder: Path, *entries: tuple[MediaPart, Any, Features], **options: Any) -> Path:
    writer = open_writer(folder, **options)
    for medium, run, values in entries:
        writer.add(medium, media_key(medium), run, values)
    writer.finish(writer.close())
    return writer.folder


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_what_was_written_is_read(tmp_path: Path, stored: str) -> None:
    one, two = part(tmp_path, "1.mp4", "one"), part(tmp_path, "2.wav", "two", "audio")
    given, dtype = (features(0), features(1, video=0, audio=5)), getattr(torch, stored)
    folder = write(tmp_path, (one, VIDEO, given[0]), (two, AudioRun(5), given[1]), stored=stored, shard_bytes=100)
    assert len(list(folder.glob("*.safetensors"))) == 2
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {one.path.stat().st_mode & 0o777}
    cache = pickle.loads(pickle.dumps(FeatureCache(folder, SETTINGS)))
    assert cache.rounding == (None if stored == "float32" else stored)
    read = cache.read(one)
    assert read.run == VIDEO
    assert torch.equal(read.features.video, given[0].video.to(dtype))
    assert torch.equal(read.features.audio, given[0].audio.to(dtype))
    assert torch.equal(read.features.extra["video/deepstack.0"], given[0].extra["video/deepstack.0"].to(dtype))
    assert torch.equal(read.features.extra[STATISTIC], given[0].extra[STATISTIC])
    other = cache.read(two)
    assert other.run == AudioRun(5)
    assert other.features.video is None
    assert torch.equal(other.features.audio, given[1].audio.to(dtype))


@pytest.mark.parametrize(("encoded", "stored", "rounding"), [
    ("float32", "float32", None), ("bfloat16", "bfloat16", None), ("bfloat16", "float32", None),
    ("float32", "bfloat16", "bfloat16"), ("float32", "int8", "int8"), ("bfloat16", "int8", "int8"),
])  # fmt: skip
def test_a_cache_says_whether_it_rounds(encoded: str, stored: str, rounding: str | None) -> None:
    assert Origin({}, encoded, stored).rounding == rounding


@pytest.mark.parametrize("encoded", ["float32", "bfloat16"])
def test_int8_comes_back_in_the_dtype_of_the_encoders(tmp_path: Path, encoded: str) -> None:
    """An error of at most half a step of 1/127 of the row's largest value; statistics are exact."""
    one, given = part(tmp_path, "1.mp4", "one"), features(0)
    dtype = getattr(torch, encoded)
    writer = FeatureCacheWriter(tmp_path / "c", Origin(SETTINGS, encoded, "int8"), statistics=[STATISTIC])
    given = Features(given.video.to(dtype), given.audio.to(dtype), extra=given.extra)
    writer.add(one, media_key(one), VIDEO, given)
    writer.finish(writer.close())
    read = FeatureCache(tmp_path / "c", SETTINGS).read(one).features
    assert torch.equal(read.extra[STATISTIC], given.extra[STATISTIC])
    slack = 1e-6 if encoded == "float32" else 2**-8  # of rounding to bfloat16
    for ours, theirs in ((read.video, given.video), (read.audio, given.audio)):
        assert ours.dtype == dtype
        largest = theirs.float().abs().amax(1, keepdim=True)
        assert ((ours.float() - theirs.float()).abs() <= largest * (0.5 / 127 + slack)).all()


def test_content_and_sampling_make_the_key(tmp_path: Path) -> None:
    one = part(tmp_path, "1.mp4", "one")
    cache = FeatureCache(write(tmp_path, (one, VIDEO, features(0))), SETTINGS)
    assert part(tmp_path, "renamed.mp4", "one") in cache
    assert MediaPart("video", one.path, fps=1.0) not in cache
    changed = part(tmp_path, "1.mp4", "changed")
    assert changed not in cache
    with pytest.raises(FeatureCacheError, match=r"1\.mp4 is not in the feature cache .* or was changed"):
        cache.read(changed)


def test_other_preprocessing_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, (part(tmp_path, "1.mp4", "one"), VIDEO, features(0)))
    with pytest.raises(FeatureCacheError, match=r"fps: cached 2\.0, asked 1\.0; weights: cached 'abc', asked 'xyz'"):
        FeatureCache(folder, {**SETTINGS, "fps": 1.0, "weights": "xyz"})


def test_unfinished_and_damaged_caches_are_named(tmp_path: Path) -> None:
    writer, one = open_writer(tmp_path), part(tmp_path, "1.mp4", "one")
    writer.add(one, media_key(one), VIDEO, features(0))
    with pytest.raises(FeatureCacheError, match="no finished feature cache"):
        FeatureCache(tmp_path / "cache", SETTINGS)
    writer.finish(writer.close())
    (shard,) = (tmp_path / "cache").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(FeatureCacheError, match=r"features-.*-0000-00000.safetensors is damaged or gone"):
        FeatureCache(tmp_path / "cache", SETTINGS).read(one)


def test_a_cache_of_an_older_version_is_refused_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, folder / "features-00000.safetensors")
    (folder / "index.json").write_text('{"version": 1, "preprocessing": {}, "entries": {}}')
    for use in (lambda: open_writer(tmp_path), lambda: FeatureCache(folder, SETTINGS)):
        with pytest.raises(FeatureCacheError, match="another version of omnisieve; remove it and cache again"):
            use()
    assert len(list(folder.iterdir())) == 2


def test_adding_with_other_settings_is_refused(tmp_path: Path) -> None:
    one = part(tmp_path, "1.mp4", "one")
    write(tmp_path, (one, VIDEO, features(0)))
    told = r"data.feature_cache_dtype: cached 'float32', asked 'int8'; fps: cached 2\.0, asked 1\.0"
    with pytest.raises(FeatureCacheError, match=told):
        open_writer(tmp_path, {**SETTINGS, "fps": 1.0}, stored="int8")


def test_a_full_disk_is_told_and_finished_shards_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (part(tmp_path, f"{name}.mp4", name) for name in ("one", "two"))
    writer = open_writer(tmp_path, shard_bytes=1)
    writer.add(one, media_key(one), VIDEO, features(0))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(feature_shards, "save_file", full)
        with pytest.raises(FeatureCacheError, match=r"cannot write .*No space left .* MiB are free there"):
            writer.add(two, media_key(two), VIDEO, features(1))
    again = open_writer(tmp_path)
    assert [again.lacks(media_key(medium)) for medium in (one, two)] == [False, True]


def test_an_unreadable_file_fails_as_it_does_without_a_cache(tmp_path: Path) -> None:
    good, bad, slow, gone = (part(tmp_path, f"{name}.mp4", name) for name in ("good", "bad", "slow", "gone"))
    writer = open_writer(tmp_path)
    writer.add(good, media_key(good), VIDEO, features(0))
    writer.leave_out(media_key(bad), MediaError(str(bad.path), "video", "corrupt", "9 of 9 packets do not decode"))
    writer.leave_out(media_key(slow), MediaError(str(slow.path), "video", "timeout", "took longer than 1 s"))
    writer.finish(writer.close())
    gone.path.unlink()
    cache = FeatureCache(tmp_path / "cache", SETTINGS)
    with pytest.raises(MediaError, match=r"bad\.mp4: video: 9 of 9 packets do not decode \(corrupt\)"):
        cache.read(bad)
    with pytest.raises(MediaError, match=r"slow\.mp4: video: took longer"):
        cache.read(slow)
    with pytest.raises(MediaError, match=r"gone\.mp4.* there is no such file"):
        cache.read(gone)
    # Another run tries again what may have been the machine's fault, and what it then reads counts.
    again = open_writer(tmp_path)
    assert again.contents.fault(media_key(bad)) == ["video", "corrupt", "9 of 9 packets do not decode"]
    assert again.contents.fault(media_key(slow)) is None
    again.add(slow, media_key(slow), VIDEO, features(1))
    again.finish(again.close())
    assert FeatureCache(tmp_path / "cache", SETTINGS).read(slow).run == VIDEO


def test_statistics_are_added_beside_the_features(tmp_path: Path) -> None:
    one, two, key = part(tmp_path, "1.mp4", "one"), part(tmp_path, "2.mp4", "two"), "video/keys"
    write(tmp_path, (one, VIDEO, features(0)))
    more = Origin(SETTINGS, "float32", "float32")
    writer = FeatureCacheWriter(tmp_path / "cache", more, statistics=[STATISTIC, key])
    keys = torch.randn(8, 3)
    assert writer.lacks(media_key(one))
    # What is there already is not written again: these other features are not seen.
    writer.add(one, media_key(one), VIDEO, replace(features(5), extra={**features(5).extra, key: keys}))
    silent = replace(features(1, audio=0), extra={key: keys + 1, "video/deepstack.0": torch.zeros(8, 16)})
    writer.add(two, media_key(two), VideoRun((2, 4, 4), 1.0), silent)
    writer.finish(writer.close())
    read = FeatureCache(tmp_path / "cache", SETTINGS).read(one).features
    assert torch.equal(read.extra[key], keys)
    assert torch.equal(read.video, features(0).video)
    assert not any(writer.lacks(media_key(medium)) for medium in (one, two))
    again = FeatureCacheWriter(tmp_path / "cache", more, statistics=[STATISTIC, key])
    assert not any(again.lacks(media_key(medium)) for medium in (one, two))


def test_rows_must_be_those_of_the_tokens(tmp_path: Path) -> None:
    one = part(tmp_path, "1.mp4", "one")
    with pytest.raises(FeatureCacheError, match="29 audio features for 30 audio tokens"):
        write(tmp_path, (one, VIDEO, features(0, audio=29)))
    wrong = Features(video=torch.zeros(8, 4), audio=torch.zeros(30, 4), extra={"video/x": torch.zeros(7)})
    with pytest.raises(FeatureCacheError, match="7 rows of 'video/x' for 8 tokens"):
        write(tmp_path / "b", (one, VIDEO, wrong))


def test_samples_from_the_cache_equal_decoded_ones(tmp_path: Path, media: object) -> None:
    parts = [
        MediaPart("video", media("clip.mp4")),  # type: ignore[operator]
        MediaPart("video", media("silent.mp4", audio_seconds=0)),  # type: ignore[operator]
    ]
    preprocessor = Preprocessor(stock_processor(), rules(), min_pixels=56 * 56, max_pixels=56 * 112)
    decoding = MediaLoader(preprocessor)
    settings = decoding.preprocessing("weights")
    writer = FeatureCacheWriter(tmp_path / "cache", Origin(settings, "float32", "float32"))
    for number, medium in enumerate(parts):
        run = decoding.load_part(medium).run
        assert isinstance(run, VideoRun)
        audio = torch.full((run.audio_tokens, 4), float(number)) if run.audio_tokens else None
        writer.add(medium, media_key(medium), run, Features(torch.full((32, 4), 10.0 + number), audio))
    writer.finish(writer.close())
    cached = MediaLoader(preprocessor, cache=FeatureCache(tmp_path / "cache", settings))
    conversations = [Conversation.alone(medium) for medium in parts]
    decoded = [decoding.sample(c, decoding.load(c)) for c in conversations]
    samples = [cached.sample(c, cached.load(c)) for c in conversations]
    for ours, theirs in zip(samples, decoded, strict=True):
        assert torch.equal(ours.input_ids, theirs.input_ids)
        assert torch.equal(ours.position_ids, theirs.position_ids)
        assert ours.seconds_per_grid == theirs.seconds_per_grid
        assert ours.video_grids == theirs.video_grids
        assert not ours.videos
        assert not ours.audios
    batch = collate(samples, pad_token_id=0)
    assert batch.pixel_values_videos is None
    assert batch.features is not None
    assert batch.features.video[:, 0].tolist() == [10.0] * 32 + [11.0] * 32
    assert len(batch.features.audio) == batch.layout.counts(Modality.AUDIO).sum() == 100
    with pytest.raises(ValueError, match="have no cached features while others"):
        collate([samples[0], decoded[1]], pad_token_id=0)
