"""How densely media are read, and the protocols of that which others published.

| preset | frames | tokens of a frame | source |
|---|---|---|---|
| `qwen_omni_utils` | 4 to 768 at 2 fps | 128 to 768 | qwen_omni_utils 0.0.9 of the Qwen team |
| `omnisift` | at most 256 at 2 fps | 128 to 320 | OmniSIFT's training |
| `omnizip` | at most 128 at 2 fps | 128 to 144 | OmniZip, section 4.1 |
| `seats` | at most 128 at 2 fps | 128 to 144 | SEATS, implementation details |

What a paper does not say is taken from qwen_omni_utils, the reader of the models it evaluates. OmniZip and SEATS allow
more frames for benchmarks of long videos: 768 for Video-MME; SEATS also for LVOmniBench, and 256 for OmniVideoBench.

A token stands for `side` x `side` pixels, `side` = patch size x merge size: 28 for Qwen2.5-Omni, 32 for Qwen3-Omni.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Placement = Literal["steps", "even"]

_SHARE_OF_CONTEXT = 0.9
_CONTEXT = 128_000
# Frames of a temporal patch, which share the cap on a whole video.
_FRAMES_PER_TOKEN = 2
_ROOM_ABOVE_MIN = 1.05


@dataclass(frozen=True)
class Protocol:
    """How densely the media of a run are read.

    Attributes:
        name: of the preset that it began with, or "processor".
        placement: of the frames. "steps": one every 1 / `fps` seconds, by time. "even": an even number of them, spread
            from the first to the last frame of the file.
        fps: frames per second, if that gives between `min_frames` and `max_frames`.
        min_frames: at least so many, as far as the file has them; not used by "steps".
        max_frames: at most so many; None: no limit.
        min_pixels, max_pixels: size of a video frame after resizing.
        total_pixels: of a whole video: many frames must be smaller than `max_pixels`; None: no limit.
        min_image_pixels, max_image_pixels: size of an image after resizing.
    """

    name: str
    placement: Placement
    fps: float
    min_frames: int
    max_frames: int | None
    min_pixels: int
    max_pixels: int
    total_pixels: int | None
    min_image_pixels: int
    max_image_pixels: int

    def frame_pixels(self, frames: int) -> int:
        """Largest size of a frame of a video that has so many."""
        return frame_pixels(frames, self.min_pixels, self.max_pixels, self.total_pixels)


@dataclass(frozen=True)
class Preset:
    """A published protocol, with sizes in tokens. Its defaults are those of qwen_omni_utils 0.0.9.

    Attributes: see `Protocol`.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    min_tokens: int = 128
    max_tokens: int = 768
    min_image_tokens: int = 4
    max_image_tokens: int = 16_384

    def protocol(self, name: str, side: int) -> Protocol:
        """In pixels, for a model whose tokens stand for `side` x `side` of them."""
        area = side * side
        return Protocol(
            name=name,
            placement="even",
            fps=self.fps,
            min_frames=self.min_frames,
            max_frames=self.max_frames,
            min_pixels=self.min_tokens * area,
            max_pixels=self.max_tokens * area,
            total_pixels=int(_CONTEXT * area * _SHARE_OF_CONTEXT),
            min_image_pixels=self.min_image_tokens * area,
            max_image_pixels=self.max_image_tokens * area,
        )


PRESETS = {
    # smart_nframes, fetch_video and fetch_image of qwen_omni_utils 0.0.9, `v2_5/vision_process.py`.
    "qwen_omni_utils": Preset(),
    # Training script and paper: 2 fps, at most 256 frames, at most 320 * 28 * 28 pixels. Its evaluation script has
    # 256 * 28 * 28 instead.
    "omnisift": Preset(max_frames=256, max_tokens=320),
    # Section 4.1: at most 128 frames; 288 video tokens a window of 2 s, which are 144 for each of its two grids.
    "omnizip": Preset(max_frames=128, max_tokens=144),
    # Implementation details: 2 fps, at most 128 frames, windows as in OmniZip; its code: 128 to 144 * 28 * 28 pixels.
    "seats": Preset(max_frames=128, max_tokens=144),
}


def frame_pixels(frames: int, min_pixels: int, max_pixels: int, total_pixels: int | None) -> int:
    """Largest size of a frame of a video of so many, as `fetch_video` of qwen_omni_utils has it.

    The total is shared out evenly, but leaves every frame 5 % above `min_pixels`.
    """
    if total_pixels is None:
        return max_pixels
    share = int(total_pixels / frames * _FRAMES_PER_TOKEN)
    return min(max_pixels, max(share, int(min_pixels * _ROOM_ABOVE_MIN)))
