from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from omnisieve.data.batch import Features
from omnisieve.data.collate import collate
from omnisieve.data.dataset import MediaLoader
from omnisieve.data.feature_cache import FeatureCache, FeatureCacheError, FeatureCacheWriter
from omnisieve.data.manifest import Conversation, MediaPart
from omnisieve.data.media import MediaError
from omnisieve.data.preprocess import Preprocessor
from omnisieve.data.tokens import AudioRun, VideoRun
from omnisieve.layout import Modality
from tests.data.stock import rules, stock_processor

SETTINGS = {"fps": 2.0, "max_frames": None, "weights": "abc"}
VIDEO = VideoRun((2, 4, 4), 1.0, 30)


def part(folder: Path, name: str, content: str, kind: str = "video") -> MediaPart:
    (folder / name).write_text(content)
    return MediaPart(kind, folder / name)


def features(seed: int, video: int = 8, audio: int = 30) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(
        video=torch.randn(video, 16, generator=generator) if video else None,
        audio=torch.randn(audio, 16, generator=generator) if audio else None,
        extra={"audio/attention": torch.rand(audio, generator=generator)},
    )


def write(folder: Path, *entries: tuple[MediaPart, object, Features], **options: object) -> Path:
    with FeatureCacheWriter(folder / "cache", SETTINGS, **options) as writer:
        for medium, run, values in entries:
            writer.add(medium, run, values)
    return folder / "cache"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_written_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    one, two = part(tmp_path, "1.mp4", "one"), part(tmp_path, "2.wav", "two", "audio")
    given = features(0), features(1, video=0, audio=5)
    folder = write(tmp_path, (one, VIDEO, given[0]), (two, AudioRun(5), given[1]), dtype=dtype, shard_bytes=100)
    assert len(list(folder.glob("*.safetensors"))) == 2
    cache = pickle.loads(pickle.dumps(FeatureCache(folder, SETTINGS)))
    read = cache.read(one)
    assert read.run == VIDEO
    assert torch.equal(read.features.video, given[0].video.to(dtype))
    assert torch.equal(read.features.audio, given[0].audio.to(dtype))
    assert torch.equal(read.features.extra["audio/attention"], given[0].extra["audio/attention"])
    other = cache.read(two)
    assert other.run == AudioRun(5)
    assert other.features.video is None
    assert torch.equal(other.features.audio, given[1].audio.to(dtype))


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


def test_unfinished_missing_and_present_caches(tmp_path: Path) -> None:
    writer = FeatureCacheWriter(tmp_path / "cache", SETTINGS)
    writer.add(part(tmp_path, "1.mp4", "one"), VIDEO, features(0))
    with pytest.raises(FeatureCacheError, match="no finished feature cache"):
        FeatureCache(tmp_path / "cache", SETTINGS)
    writer.close()
    FeatureCache(tmp_path / "cache", SETTINGS)
    with pytest.raises(FeatureCacheError, match="already holds a feature cache"):
        FeatureCacheWriter(tmp_path / "cache", SETTINGS)


def test_an_unreadable_file_fails_as_it_does_without_a_cache(tmp_path: Path) -> None:
    good, bad, gone = (part(tmp_path, f"{name}.mp4", name) for name in ("good", "bad", "gone"))
    with FeatureCacheWriter(tmp_path / "cache", SETTINGS) as writer:
        writer.add(good, VIDEO, features(0))
        writer.leave_out(bad, MediaError(str(bad.path), "video", "corrupt", "9 of 9 packets do not decode"))
        gone.path.unlink()
        writer.leave_out(gone, MediaError(str(gone.path), "container", "missing", "there is no such file"))
    cache = FeatureCache(tmp_path / "cache", SETTINGS)
    assert all(cache.covers(medium) for medium in (good, bad, gone))
    assert not cache.covers(part(tmp_path, "new.mp4", "new"))
    with pytest.raises(MediaError, match=r"bad\.mp4: video: 9 of 9 packets do not decode \(corrupt\)"):
        cache.read(bad)
    with pytest.raises(MediaError, match=r"gone\.mp4.* there is no such file"):
        cache.read(gone)


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
    with FeatureCacheWriter(tmp_path / "cache", settings, dtype=torch.float32) as writer:
        for number, medium in enumerate(parts):
            run = decoding.load_part(medium).run
            assert isinstance(run, VideoRun)
            audio = torch.full((run.audio_tokens, 4), float(number)) if run.audio_tokens else None
            writer.add(medium, run, Features(torch.full((32, 4), 10.0 + number), audio))
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
