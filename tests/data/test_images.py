"""What the world's image files become, and which of them are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omnisieve.data.images import FORMATS, read_image
from omnisieve.data.media import MediaError

HEIGHT, WIDTH = 16, 32
RAMP = np.tile(np.linspace(0, 1, WIDTH), (HEIGHT, 1))
GREY = np.rint(RAMP * 255).astype(np.uint8)
COLOR = np.stack([GREY, 255 - GREY, np.full_like(GREY, 90)], axis=-1)
SHAPE = np.zeros((HEIGHT, WIDTH), np.uint8)
SHAPE[4:12, 8:24] = 255


def levels(path: Path) -> np.ndarray:
    """Grey levels [H, W] of an image without color."""
    picture = read_image(path)
    assert picture.dtype == np.uint8
    assert (picture == picture[..., :1]).all()
    return picture[..., 0]


def refusal(path: Path) -> MediaError:
    with pytest.raises(MediaError) as caught:
        read_image(path)
    return caught.value


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "jfif", "jpe", "webp", "bmp", "tif", "tiff", "avif", "gif",
                                    "jp2", "ppm"])  # fmt: skip
def test_stills_of_every_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(COLOR).save(path, **({"format": "JPEG"} if suffix in ("jfif", "jpe") else {}))
    path = path.rename(tmp_path / "without_a_suffix")
    assert np.abs(read_image(path).astype(int) - COLOR).mean() < 6


def test_every_value_of_a_plain_image_is_kept(tmp_path: Path) -> None:
    Image.fromarray(COLOR).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), COLOR)


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (6, -1), (3, 2), (8, 1)])
@pytest.mark.parametrize("sixteen", [False, True])
def test_images_are_upright(tmp_path: Path, orientation: int, turns: int, sixteen: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = (RAMP * 65535).astype(np.uint16) if sixteen else GREY
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(levels(tmp_path / "a.png"), np.rot90(GREY, turns))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("sixteen.png", (RAMP * 65535).astype(np.uint16)),
        ("sixteen.tif", (RAMP * 65535).astype(np.uint16)),
        ("big_endian.tif", (RAMP * 65535).astype(">u2")),
        ("integers.tif", (RAMP * 65535).astype(np.int32)),
        ("large_integers.tif", (RAMP * 2e9).astype(np.int32)),
        ("negative_integers.tif", (RAMP * 2000 - 1000).astype(np.int32)),
        ("floats.tif", RAMP.astype(np.float32)),
        ("floats_to_255.tif", (RAMP * 255).astype(np.float32)),
        ("depth.tif", (RAMP * 8.5).astype(np.float32)),
        ("negative_floats.tif", (RAMP - 0.5).astype(np.float32)),
    ],
)
def test_deep_images_are_scaled_and_never_clipped(tmp_path: Path, name: str, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / name)
    assert np.abs(levels(tmp_path / name).astype(int) - GREY).max() <= 1


def test_a_maximum_of_its_own_is_white(tmp_path: Path) -> None:
    values = (RAMP * 1000).astype(">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5 32 16 1000\n" + values.tobytes())
    assert np.abs(levels(tmp_path / "a.pgm").astype(int) - GREY).max() <= 1


@pytest.mark.parametrize(("name", "values"), [
    ("a.png", (RAMP * 9000).astype(np.uint16)), ("a.tif", (RAMP * 9000).astype(np.uint16)),
    ("b.tif", (RAMP * 9000 / 65535).astype(np.float32)),
])  # fmt: skip
def test_dark_images_stay_dark(tmp_path: Path, name: str, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / name)
    assert levels(tmp_path / name).max() == round(9000 / 257)


def test_what_is_no_number_is_black(tmp_path: Path) -> None:
    values = RAMP.astype(np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path / "a.tif")
    found = levels(tmp_path / "a.tif")
    assert found[0, 0] == 0
    np.testing.assert_array_equal(found[1:], GREY[1:])


def transparent_images() -> dict[str, Callable[[Path], Any]]:
    """A black shape on nothing, in every way that files have to say so."""
    black = np.zeros_like(SHAPE)
    rgba = Image.fromarray(np.stack([black, black, black, SHAPE], axis=-1))
    grey_alpha = Image.fromarray(np.stack([black, SHAPE], axis=-1))
    palette = Image.fromarray((SHAPE == 0).astype(np.uint8), "L")
    palette = palette.convert("P")
    palette.putpalette([0, 0, 0, 200, 30, 30])
    key = Image.fromarray(np.where(SHAPE[..., None] > 0, 0, [10, 200, 10]).astype(np.uint8))
    deep = Image.fromarray(np.where(SHAPE > 0, 0, 4242).astype(np.uint16))
    return {
        "rgba.png": rgba.save,
        "rgba.webp": lambda path: rgba.save(path, lossless=True),
        "rgba.tif": rgba.save,
        "grey.png": grey_alpha.save,
        "palette.png": lambda path: palette.save(path, transparency=1),
        "palette.gif": lambda path: palette.save(path, transparency=1),
        "key.png": lambda path: key.save(path, transparency=(10, 200, 10)),
        "grey_key.png": lambda path: Image.fromarray((SHAPE == 0).astype(np.uint8) * 9).save(path, transparency=9),
        "deep_key.png": lambda path: deep.save(path, transparency=4242),
    }


@pytest.mark.parametrize("name", transparent_images())
def test_transparency_is_laid_on_white(tmp_path: Path, name: str) -> None:
    transparent_images()[name](tmp_path / name)
    np.testing.assert_array_equal(levels(tmp_path / name), 255 - SHAPE)


def test_half_transparent_is_half_white(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4, 4), (0, 0, 0, 128), np.uint8)).save(tmp_path / "a.png")
    assert set(levels(tmp_path / "a.png").ravel()) == {127}


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGBX"])
def test_modes_are_what_they_look_like(tmp_path: Path, mode: str) -> None:
    Image.fromarray(SHAPE).convert("RGB").convert(mode).save(tmp_path / "a.tif")
    np.testing.assert_allclose(levels(tmp_path / "a.tif"), SHAPE, atol=1)


def frames() -> list[Image.Image]:
    return [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (10, 90, 200)]


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif", "avif"])
def test_an_animated_image_is_refused_with_the_cure(tmp_path: Path, suffix: str) -> None:
    first, *others = frames()
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=others)
    error = refusal(tmp_path / f"a.{suffix}")
    assert error.kind == "animated"
    assert "3 frames" in error.reason
    assert "as a video" in error.cure
    first.save(tmp_path / f"a.{suffix}", save_all=True)
    assert np.abs(read_image(tmp_path / f"a.{suffix}").astype(int) - 10).max() <= 3


def test_a_photo_beside_its_preview_is_the_photo(tmp_path: Path) -> None:
    first, *others = frames()
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=others)
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - 10).max() <= 3


def test_only_named_formats_are_opened(tmp_path: Path) -> None:
    assert "EPS" not in FORMATS
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    (tmp_path / "b.png").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 50)
    (tmp_path / "c.png").write_bytes(b"text")
    for name in ("a.png", "b.png", "c.png"):
        error = refusal(tmp_path / name)
        assert error.kind == "not_media"
        assert "must be converted" in error.reason


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tif", "avif", "jp2", "bmp"])
def test_a_cut_image_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert refusal(path).kind in ("truncated", "corrupt", "not_media")


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    assert refusal(tmp_path / "empty.png").kind == "empty"
    (tmp_path / "folder.png").mkdir()
    for name, reason in (
        ("gone.png", "there is no such file"),
        ("folder.png", "is a folder"),
        ("a" * 300 + ".png", "File name too long"),
        ("a/" * 3000, "File name too long"),
        ("a\0b.png", "null byte"),
    ):
        error = refusal(tmp_path / name)
        assert error.kind == "missing"
        assert reason in error.reason
        assert len(str(error)) < 600
