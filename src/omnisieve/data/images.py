"""Still images to RGB arrays.

| image | result |
|---|---|
| turned by EXIF | upright |
| transparent (RGBA, LA, a palette or a color that is see-through) | laid on white, as qwen_omni_utils does |
| 16 bits per channel | by 1/257, so that white stays white |
| 32-bit integers, floats | 0 is black and the greatest value white; see `_grey` |
| CMYK, YCbCr, palette, 1 bit | as RGB, without color management |
| several frames or pages (GIF, APNG, WebP, AVIF, TIFF) | `MediaError`, kind "animated" |
| a photo with a second picture inside for the camera's own use (MPO) | the photo |
| none of `FORMATS` | "not_media" |
| cut off | "truncated" |
| whatever else the image library does not get through | "corrupt" |
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from omnisieve.data.errors import foreign_errors
from omnisieve.data.media import MediaError, check_file

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI", "ICO")
"""Formats that are opened. Each is known by its first bytes, and none starts another program, as EPS does."""


def read_image(path: str | Path) -> np.ndarray:
    """An image as uint8 [H, W, 3], upright RGB.

    Raises:
        MediaError: see the table above; or the file is missing or empty.
    """
    check_file(path)
    with foreign_errors(lambda text: _damaged(path, text)):
        try:
            image = Image.open(path, formats=FORMATS)
        except UnidentifiedImageError as error:
            with open(path, "rb") as file:
                name = claimed(file.read(16))
            if name is not None:
                raise MediaError(str(path), "image", "corrupt", f"it begins as {name}, but cannot be opened") from error
            reason = f"the content is none of {', '.join(FORMATS)}; other pictures (HEIC, SVG, PSD) must be converted"
            raise MediaError(str(path), "image", "not_media", reason) from error
        with image:
            if has_frames(image):
                reason = f"it has {image.n_frames} frames or pages, and an image is one picture"  # type: ignore[attr-defined]
                raise MediaError(str(path), "image", "animated", reason)
            return np.asarray(_on_white(ImageOps.exif_transpose(image)))


def has_frames(image: Image.Image) -> bool:
    """Whether an opened image has several frames or pages that are pictures in their own right."""
    # What an MPO holds beside the photo is a preview, its brightness or its depth.
    return image.format != "MPO" and bool(getattr(image, "is_animated", False))


def claimed(head: bytes) -> str | None:
    """The one of `FORMATS` that a file's first 16 bytes are of."""
    accepts = {name: Image.OPEN[name][1] for name in FORMATS}
    return next((name for name, accept in accepts.items() if accept is not None and accept(head)), None)


def _damaged(path: str | Path, text: str) -> MediaError:
    return MediaError(str(path), "image", "truncated" if "truncated" in text else "corrupt", text)


def _on_white(image: Image.Image) -> Image.Image:
    """Any mode as RGB."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        grey = Image.fromarray(_grey(values, sixteen=image.mode.startswith("I;16") or image.format in ("PNG", "PPM")))
        clear = image.info.get("transparency")
        if isinstance(clear, int):  # a grey level that stands for nothing
            grey.paste(255, mask=Image.fromarray(values == clear))
        return grey.convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def _grey(values: np.ndarray, *, sixteen: bool) -> np.ndarray:
    """Integers of more than 8 bits, or floats, [H, W], as grey levels, uint8 [H, W].

    16-bit images have a range of their own. Floats and 32-bit integers have none that a file states. Floats between 0
    and 1 are taken as such. Otherwise the greatest value is white, and black is 0, or the least value where some are
    negative: nothing is clipped, whether it was meant as 0 to 255, as light or as depth. What is no number is black.
    """
    numbers = values.astype(np.float64)
    if sixteen:
        low, high = 0.0, 65535.0
    else:
        finite = numbers[np.isfinite(numbers)]
        low, high = float(finite.min(initial=0.0)), float(finite.max(initial=0.0))
        if values.dtype.kind == "f" and low >= 0:
            high = max(high, 1.0)
    scaled = (numbers - low) * (255 / max(high - low, np.finfo(np.float64).tiny))
    return np.rint(np.nan_to_num(scaled, nan=0.0).clip(0, 255)).astype(np.uint8)
