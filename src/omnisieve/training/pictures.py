"""Pictures of what stays of a clip: its frames with dropped tokens dimmed, its log-mel spectrogram with kept spans.

Pure functions from arrays to RGB arrays. A frame is drawn as the vision tower sees it, in its own proportions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from omnisieve.compressors.base import Settings
from omnisieve.data.batch import Sample
from omnisieve.data.preprocess import Preprocessor
from omnisieve.layout import Modality, TokenMap

WIDTH = 960
"""Of a picture, in pixels."""
_MARGIN, _GAP = 10, 6
_TOKEN, _WIDEST_FRAME = 11, 300  # narrowest token
_MEL_HEIGHT, _BAR_HEIGHT = 128, 8
_LINE, _TITLE = 18, 22  # heights of a line of text and of the title
_INK, _GREY, _EDGE, _KEPT, _DROPPED = (20, 20, 20), (110, 110, 110), (255, 196, 0), (34, 139, 84), (215, 215, 215)
# From quiet to loud.
_HEAT = np.array([(10, 8, 40), (84, 22, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], dtype=np.float64)
_TICKS = 8


@dataclass(frozen=True)
class Film:
    """A few frames of a video.

    Attributes:
        frames: uint8 [n, H, W, 3], the first raw frame of each step.
        steps: [n], temporal grid steps.
        seconds_per_step: of the video.
    """

    frames: np.ndarray
    steps: Sequence[int]
    seconds_per_step: float


@dataclass(frozen=True)
class ClipMedia:
    """What the encoders are shown of a clip.

    Attributes:
        id: of the clip.
        tokens: of the whole sequence.
        films: one per video, in sequence order.
        sounds: log-mel spectrograms [bins, T], in sequence order.
        mel_rate: columns of a spectrogram per second.
        ids_per_second: temporal rope ids per second.
    """

    id: str
    tokens: TokenMap
    films: tuple[Film, ...] = ()
    sounds: tuple[np.ndarray, ...] = ()
    mel_rate: float = 100.0
    ids_per_second: float = 25.0


def clip_media(sample: Sample, preprocessor: Preprocessor, frames: int = 6) -> ClipMedia:
    """What there is to draw of a sample that was decoded, not read from a feature cache.

    Args:
        sample: with patches and spectrograms.
        preprocessor: that made them.
        frames: at most so many of each video, evenly spread.
    """
    films = []
    for patches in sample.videos:
        steps = spread(patches.grid[0], frames)
        shown = preprocessor.shown(patches, steps)[:: preprocessor.rules.temporal_patch_size]
        films.append(Film(shown, steps, patches.seconds_per_grid))
    extractor = preprocessor.feature_extractor
    return ClipMedia(
        id=sample.id,
        tokens=sample.tokens,
        films=tuple(films),
        sounds=tuple(mel.float().numpy() for mel in sample.audios),
        mel_rate=extractor.sampling_rate / extractor.hop_length,
        ids_per_second=preprocessor.rules.ids_per_second,
    )


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the numbers below `count`, from the first to the last, evenly."""
    return sorted(set(np.linspace(0, count - 1, min(wanted, count)).round().astype(int).tolist()))


def picture(clip: ClipMedia, keep: np.ndarray, title: str) -> np.ndarray:
    """All of a clip, uint8 [H, WIDTH, 3].

    Args:
        clip: what to draw.
        keep: [S] bool, which tokens stay.
        title: of the picture.
    """
    tokens = clip.tokens
    rows = [text(title, 16, _INK), text(caption(keep, tokens), 13, _GREY)]
    for film, item in zip(clip.films, _items(tokens, Modality.VIDEO), strict=True):
        rows.append(strip(film, kept_cells(keep, tokens, item)))
    for sound, item in zip(clip.sounds, _items(tokens, Modality.AUDIO), strict=True):
        member = tokens.item == item
        seconds = tokens.time[member] / clip.ids_per_second
        rows.append(spectrogram(sound, keep[member], seconds, clip.mel_rate))
    rows.append(text("full colour inside yellow lines: kept tokens; dimmed: dropped; green bar: kept sound", 12, _GREY))
    space = np.full((_GAP, WIDTH, 3), 255, dtype=np.uint8)
    return np.concatenate([space, *(part for row in rows for part in (row, space))])


def asked_ratio(settings: Settings) -> str:
    """The ratios that a compressor was asked for, in words."""
    ratios = {"all": settings.retained_ratio, "video": settings.video_ratio, "audio": settings.audio_ratio}
    return "asked ratio " + ", ".join(f"{name} {value:g}" for name, value in ratios.items() if value is not None)


def caption(keep: np.ndarray, tokens: TokenMap) -> str:
    """How much stays, in words."""
    shares = []
    for modality in (Modality.VIDEO, Modality.AUDIO):
        member = tokens.modality == modality
        if member.any():
            kept, total = int(keep[member].sum()), int(member.sum())
            shares.append(f"{modality.name.lower()}: {kept} of {total} tokens kept ({100 * kept / total:.1f} %)")
    return ", ".join(shares) or "no video, no sound"


def kept_cells(keep: np.ndarray, tokens: TokenMap, item: int) -> np.ndarray:
    """Which cells of a video's token grid stay, bool [steps, rows, columns].

    Args:
        keep: [S] bool.
        tokens: of the sequence.
        item: the video's number in it.
    """
    place = tuple(axis[tokens.item == item] for axis in (tokens.frame, tokens.row, tokens.column))
    cells = np.zeros([int(axis.max()) + 1 for axis in place], dtype=bool)
    cells[place] = keep[tokens.item == item]
    return cells


def strip(film: Film, cells: np.ndarray) -> np.ndarray:
    """Frames side by side with the time under each, in as many rows as it takes to see their tokens.

    Args:
        film: n frames.
        cells: bool [steps, rows, columns], which tokens of the whole video stay.

    Returns:
        uint8 [H, WIDTH, 3].
    """
    count, (height, width) = len(film.frames), film.frames.shape[1:3]
    narrowest = _TOKEN * cells.shape[2]
    room = WIDTH - 2 * _MARGIN + _GAP
    per_row = min(max(room // (narrowest + _GAP), 1), count)
    shown_width = min(room // per_row - _GAP, max(_WIDEST_FRAME, narrowest))
    shown_height = round(shown_width * height / width)
    canvas = Image.new("RGB", (WIDTH, -(-count // per_row) * (shown_height + _LINE)), "white")
    pen = ImageDraw.Draw(canvas)
    for number, (frame, step) in enumerate(zip(film.frames, film.steps, strict=True)):
        row, column = divmod(number, per_row)
        left, top = _MARGIN + column * (shown_width + _GAP), row * (shown_height + _LINE)
        resized = np.asarray(Image.fromarray(frame).resize((shown_width, shown_height), Image.Resampling.BICUBIC))
        canvas.paste(Image.fromarray(marked(resized, cells[step])), (left, top))
        label = f"{step * film.seconds_per_step:.1f} s: {cells[step].sum()} of {cells[step].size}"
        place = (left + shown_width // 2, top + shown_height + _LINE / 2)
        pen.text(place, label, _INK, ImageFont.load_default(12), anchor="mm")
    return np.asarray(canvas)


def marked(frame: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """A frame whose dropped tokens are dimmed; a line runs along the kept ones, on their side.

    Args:
        frame: uint8 [H, W, 3].
        cells: bool [rows, columns], which tokens stay.
    """
    rows, columns = (np.arange(size) * count // size for size, count in zip(frame.shape, cells.shape, strict=False))
    kept = cells[rows[:, None], columns]
    around = np.pad(kept, 1, constant_values=False)
    inside = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    out = np.where(kept[..., None], frame, dimmed(frame))
    return np.where((kept & ~inside)[..., None], np.array(_EDGE, dtype=np.uint8), out)


def dimmed(image: np.ndarray) -> np.ndarray:
    """Without colour and half as bright, [..., 3] uint8."""
    grey = image @ np.array([0.299, 0.587, 0.114]) / 2
    return np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=-1)


def spectrogram(mel: np.ndarray, keep: np.ndarray, seconds: np.ndarray, mel_rate: float) -> np.ndarray:
    """A spectrogram, low tones below, with a bar of the kept spans and the time, uint8 [H, WIDTH, 3].

    Where several tokens share a column of pixels, it is dimmed by the share of them that is dropped.

    Args:
        mel: [bins, T].
        keep: [N] bool, which audio tokens stay.
        seconds: [N] ascending, where each begins.
        mel_rate: columns of `mel` per second.
    """
    width, duration = WIDTH - 2 * _MARGIN, mel.shape[1] / mel_rate
    share = kept_share(keep, seconds, duration, width)[:, None]
    low, high = np.percentile(mel, (1, 99))
    level = Image.fromarray(((mel[::-1] - low) / max(high - low, 1e-6)).clip(0, 1).astype(np.float32))
    loud = np.asarray(level.resize((width, _MEL_HEIGHT), Image.Resampling.BOX))
    colours = np.stack([np.interp(loud, np.linspace(0, 1, len(_HEAT)), channel) for channel in _HEAT.T], axis=-1)
    body = share * colours + (1 - share) * dimmed(colours)
    bar = share * np.array(_KEPT) + (1 - share) * np.array(_DROPPED)
    bar = np.broadcast_to(bar, (_BAR_HEIGHT, width, 3))
    canvas = Image.new("RGB", (WIDTH, _MEL_HEIGHT + _BAR_HEIGHT + _LINE), "white")
    drawn = np.concatenate([body, bar]).round().astype(np.uint8)
    canvas.paste(Image.fromarray(drawn), (_MARGIN, 0))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for second in np.linspace(0, duration, _TICKS + 1):
        place = _MARGIN + second / duration * (width - 1)
        anchor = "lm" if second == 0 else "rm" if second == duration else "mm"
        pen.text((place, drawn.shape[0] + _LINE / 2), f"{second:.1f} s", _INK, font, anchor=anchor)
    return np.asarray(canvas)


def kept_share(keep: np.ndarray, seconds: np.ndarray, duration: float, columns: int) -> np.ndarray:
    """How much of each of `columns` equal stretches of time is covered by kept tokens, [columns].

    A token reaches up to the next one, the last to `duration`.
    """
    edges = np.append(seconds, duration).clip(max=duration)
    covered = np.concatenate([[0.0], np.cumsum(np.diff(edges) * keep)])
    grid = np.linspace(0, duration, columns + 1)
    return np.diff(np.interp(grid, edges, covered)) / (duration / columns)


def text(line: str, size: int, colour: tuple[int, int, int]) -> np.ndarray:
    """A line of text, uint8 [H, WIDTH, 3]."""
    canvas = Image.new("RGB", (WIDTH, _TITLE if size > 14 else _LINE), "white")
    place = (_MARGIN, canvas.height / 2)
    ImageDraw.Draw(canvas).text(place, line, colour, ImageFont.load_default(size), anchor="lm")
    return np.asarray(canvas)


def _items(tokens: TokenMap, modality: Modality) -> list[int]:
    """Numbers of the media items that have tokens of a modality, in sequence order."""
    return np.unique(tokens.item[tokens.modality == modality]).tolist()
