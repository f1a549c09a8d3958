"""Writes clips as real files: mp4 (h264 + aac) and JSONL manifests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from omnisieve.data.synthetic.picture import FRAMES_PER_SECOND, draw_frames
from omnisieve.data.synthetic.questions import draw_questions
from omnisieve.data.synthetic.sound import SAMPLE_RATE, make_waveform
from omnisieve.data.synthetic.world import Clip, make_clip

AUDIO_BIT_RATE = 40_000
VIDEO_QUALITY = 30
"""Constant rate factor of x264; lower is better and larger."""
_AUDIO_BLOCK = 1024


def write_mp4(path: Path, frames: np.ndarray, waveform: np.ndarray) -> None:
    """Write frames (uint8 [F, H, W, 3] at 2 per second) and sound (float32 [samples], 16 kHz) as one mp4 file."""
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        video.height, video.width, video.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        video.options = {"preset": "veryfast", "crf": str(VIDEO_QUALITY), "threads": "1"}
        audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        audio.bit_rate = AUDIO_BIT_RATE
        audio.options = {"aac_coder": "fast"}
        for image in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(video.encode(None))
        for start in range(0, len(waveform), _AUDIO_BLOCK):
            block = av.AudioFrame.from_ndarray(
                waveform[None, start : start + _AUDIO_BLOCK], format="fltp", layout="mono"
            )
            block.sample_rate, block.pts, block.time_base = SAMPLE_RATE, start, Fraction(1, SAMPLE_RATE)
            container.mux(audio.encode(block))
        container.mux(audio.encode(None))


def manifest_line(clip: Clip) -> dict[str, Any]:
    """Return a clip's manifest line: one conversation with all questions as turns, and the evidence tokens."""
    messages: list[dict[str, Any]] = []
    for question in draw_questions(clip):
        content: Any = question.text
        if not messages:
            content = [{"type": "video", "video": f"videos/{clip.id}.mp4"}, {"type": "text", "text": question.text}]
        messages.append({"role": "user", "content": content, "family": question.family})
        messages.append({"role": "assistant", "content": question.answer})
    return {"id": clip.id, "messages": messages, "evidence": clip.evidence()}


def manifest_text(domain: str, split: str, n: int) -> str:
    """Return the manifest of the first `n` clips of a split as JSON lines."""
    lines = (json.dumps(manifest_line(make_clip(domain, split, i)), sort_keys=True) for i in range(n))
    return "".join(line + "\n" for line in lines)


def write_clip(args: tuple[str, str, int, str]) -> str:
    """Draw and write one clip, `(domain, split, index, folder)`; returns its file name. Made for worker pools."""
    domain, split, index, folder = args
    clip = make_clip(domain, split, index)
    path = Path(folder) / f"{clip.id}.mp4"
    write_mp4(path, draw_frames(clip), make_waveform(clip))
    return path.name


def world_hash(clips: Sequence[Clip]) -> str:
    """Return the SHA-256 of the frames and 16-bit waveforms of clips before any codec.

    The waveform is rounded to 12 bits, so that the last bits of a platform's sine do not matter.
    """
    digest = hashlib.sha256()
    for clip in clips:
        digest.update(draw_frames(clip).tobytes())
        digest.update(np.rint(make_waveform(clip) * 2047).astype(np.int16).tobytes())
    return digest.hexdigest()
