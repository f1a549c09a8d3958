"""What the data side is told of a model."""

from __future__ import annotations

import numpy as np
import torch

from omnisieve.backbones import adapter_for, load_backbone
from omnisieve.backbones.media import media_loader
from omnisieve.config import MediaSection
from omnisieve.data.batch import Batch
from omnisieve.data.collate import collate
from omnisieve.data.dataset import LoadedMedium, MediaLoader
from omnisieve.data.manifest import Conversation
from omnisieve.data.media import VideoFrames
from omnisieve.data.tokens import ImageRun, VideoRun
from tests.data.stock import BACKBONE


def make_batch(loader: MediaLoader) -> Batch:
    """A video and an image in one conversation."""
    frames = np.random.default_rng(0).integers(0, 256, (4, 84, 84, 3), dtype=np.uint8)
    video = loader.preprocessor.video(VideoFrames(frames, 0.5, 2.0))
    image = loader.preprocessor.image(frames[0])
    media = [
        LoadedMedium(VideoRun(video.grid, video.seconds_per_grid, 0), video),
        LoadedMedium(ImageRun(image.grid), image),
    ]
    content = [{"type": "video"}, {"type": "image"}]
    sample = loader.sample(Conversation("c", ({"role": "user", "content": content},), ()), media)
    return collate([sample], pad_token_id=0)


def test_pixels_travel_in_the_precision_of_the_encoder_and_give_the_same_features() -> None:
    adapter = adapter_for(load_backbone(BACKBONE, "bfloat16"))
    loader = media_loader(BACKBONE, adapter, MediaSection())
    early = make_batch(loader)
    loader.preprocessor.pixel_dtype = torch.float32
    late = make_batch(loader)
    for batch, dtype in ((early, torch.bfloat16), (late, torch.float32)):
        assert {batch.pixel_values.dtype, batch.pixel_values_videos.dtype} == {dtype}
    one, other = adapter.encode(early), adapter.encode(late)
    assert torch.equal(one.video, other.video)
    assert torch.equal(one.image, other.image)
