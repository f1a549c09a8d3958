"""Frames and waveforms to encoder inputs, by the stock processors of a model's folder."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import ProcessorMixin

from omnisieve.data.batch import Patches
from omnisieve.data.chat import ChatFormat
from omnisieve.data.media import SAMPLING_RATE, VideoFrames
from omnisieve.data.protocol import frame_pixels
from omnisieve.data.tokens import TokenRules

_SOUND = "mean of channels, resampled as soxr HQ"
"""How a waveform is made of a file (`media.MediaReader`); changes when that does, because caches depend on it."""
_PICTURES = "frames by time stamps; on white, deep ones scaled"
"""Likewise of frames and pictures (`images.read_image`)."""
_STFT_MARGIN = 320
"""Samples of silence behind a sound that keep the last frames of its spectrogram what long padding makes them."""


class Preprocessor:
    """What turns one clip's frames, picture or waveform into encoder inputs.

    The stock processor resizes frames between `min_pixels` and `max_pixels` each; there is no hidden cap on a video's
    total. qwen_omni_utils resizes to the same size before it, in float32 instead of uint8, which takes ten times as
    long: values of recorded clips differ by 6 of 255 at most, and by 0.2 on average.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        rules: TokenRules,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        total_pixels: int | None = None,
        image_pixels: tuple[int, int] | None = None,
        pixel_dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            processor: of the model, e.g. `AutoProcessor.from_pretrained(path)`.
            rules: of the model's family.
            min_pixels, max_pixels: size of a frame after resizing; the processor's own when None.
            total_pixels: of a video, see `protocol.Protocol`.
            image_pixels: least and largest size of an image; that of frames when None.
            pixel_dtype: of patches; that of the vision tower, which casts them first, moves no more than it needs.
        """
        self.rules = rules
        self.pixel_dtype = pixel_dtype
        self.chat = ChatFormat(processor.tokenizer, processor.chat_template)
        self.tokenizer = processor.tokenizer
        self.video_processor = processor.video_processor
        self.image_processor = processor.image_processor
        self.feature_extractor = processor.feature_extractor
        self.video_size = _size(self.video_processor, min_pixels, max_pixels)
        self.total_pixels = total_pixels
        self.image_size = _size(self.image_processor, *(image_pixels or (min_pixels, max_pixels)))
        self._grids: dict[tuple[int, int, int], tuple[int, int]] = {}

    def frame_pixels(self, frames: int) -> int:
        """Largest size of a frame of a video that has so many."""
        least, most = self.video_size["shortest_edge"], self.video_size["longest_edge"]
        return frame_pixels(frames, least, most, self.total_pixels)

    def video(self, video: VideoFrames, max_pixels: int | None = None) -> Patches:
        """Patches of a video; its last frame is repeated to fill the last temporal patch.

        Args:
            video: its frames.
            max_pixels: of a frame; by default what this object has for so many frames.
        """
        frames = torch.from_numpy(video.frames).permute(0, 3, 1, 2)
        step = self.rules.temporal_patch_size
        if missing := -len(frames) % step:
            frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
        size = self.video_size | {"longest_edge": max_pixels or self.frame_pixels(len(frames))}
        options: dict[str, Any] = {"do_sample_frames": False, "size": size}
        if hasattr(self.video_processor, "cap_pixels_per_frame"):
            options["cap_pixels_per_frame"] = False
        output = self.video_processor(videos=[frames], return_tensors="pt", **options)
        t, h, w = output["video_grid_thw"][0].tolist()
        return Patches(output["pixel_values_videos"].to(self.pixel_dtype), (t, h, w), video.seconds_per_frame * step)

    def shown(self, patches: Patches, steps: Sequence[int]) -> np.ndarray:
        """Frames as the vision tower is shown them: what `video` did, undone but for the resizing.

        Args:
            patches: of a video.
            steps: temporal grid steps, n of them.

        Returns:
            uint8 [n * temporal_patch, H, W, 3] RGB. Exact for patches in single precision.
        """
        processor, merge = self.video_processor, self.rules.spatial_merge_size
        (t, h, w), patch, step = patches.grid, processor.patch_size, self.rules.temporal_patch_size
        chosen = patches.pixels.unflatten(0, (t, h * w))[list(steps)].float()
        # A row is a patch of all channels and raw frames; rows come merge unit by merge unit.
        blocks = chosen.reshape(len(steps), h // merge, w // merge, merge, merge, -1, step, patch, patch)
        frames = blocks.permute(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(len(steps) * step, h * patch, w * patch, -1)
        if processor.do_normalize:
            frames = frames * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean)
        if processor.do_rescale:
            frames = frames / processor.rescale_factor
        return frames.round().clamp(0, 255).to(torch.uint8).numpy()

    def image(self, picture: np.ndarray) -> Patches:
        """Patches of an image, uint8 [H, W, 3]."""
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)
        output = self.image_processor(images=[pixels], size=self.image_size, return_tensors="pt")
        t, h, w = output["image_grid_thw"][0].tolist()
        return Patches(output["pixel_values"].to(self.pixel_dtype), (t, h, w))

    def audio(self, waveform: np.ndarray) -> Tensor | None:
        """Log-mel spectrogram [mel bins, ceil(samples / hop)]; None if too short for a single token.

        Equal, bit for bit from 0.1 s on, to what the extractor gives after padding to 300 s; not cut at 300 s.
        """
        hop = self.feature_extractor.hop_length
        frames = math.ceil(len(waveform) / hop)
        if not self.rules.audio_tokens(frames):
            return None
        padded = np.pad(waveform, (0, frames * hop - len(waveform) + _STFT_MARGIN))
        output = self.feature_extractor(
            padded, sampling_rate=SAMPLING_RATE, padding="longest", truncation=False, return_tensors="pt"
        )
        return output["input_features"][0, :, :frames]

    def video_grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Grid (t, h, w) in patches that `video` gives for so many upright frames of this size."""
        step = self.rules.temporal_patch_size
        most = self.frame_pixels(-(-frames // step) * step)
        if (height, width, most) not in self._grids:
            # The stock processor decides; two black frames cost it little, and sizes are few.
            black = VideoFrames(np.zeros((step, height, width, 3), np.uint8), 1.0, 1.0)
            self._grids[height, width, most] = self.video(black, most).grid[1:]
        return -(-frames // step), *self._grids[height, width, most]

    def audio_tokens(self, seconds: float) -> int:
        """Tokens of so much sound."""
        samples = round(seconds * SAMPLING_RATE)
        return self.rules.audio_tokens(math.ceil(samples / self.feature_extractor.hop_length))

    def fingerprint(self) -> dict[str, Any]:
        """What of this object decides the encoder inputs; part of a feature cache's key."""
        described = [p.to_dict() for p in (self.video_processor, self.image_processor, self.feature_extractor)]
        for settings in described:
            settings.pop("mel_filters", None)
        text = json.dumps(described, sort_keys=True, default=str)
        # Caches from before there was a cap on the total stay valid where there is none.
        total = {} if self.total_pixels is None else {"total_pixels": self.total_pixels}
        return total | {
            "sound": _SOUND,
            "pictures": _PICTURES,
            "processors": hashlib.sha256(text.encode()).hexdigest()[:16],
            "video_size": dict(self.video_size),
            "image_size": dict(self.image_size),
        }


def _size(processor: Any, min_pixels: int | None, max_pixels: int | None) -> dict[str, int]:
    """The `size` argument of a stock processor call."""
    size = dict(processor.size)
    limits = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    merged = {key: size[key] if value is None else value for key, value in limits.items()}
    if merged["shortest_edge"] > merged["longest_edge"]:
        raise ValueError(f"min_pixels {merged['shortest_edge']} is above max_pixels {merged['longest_edge']}")
    return merged
