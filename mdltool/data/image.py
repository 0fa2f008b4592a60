"""Images: clips of one frame, read and written through Pillow.

Pixels are uint8 [H, W, 3], RGB, 0..255, upright.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from mdltool.data.video import VideoError, wrong_content

# What a file with one of these names may hold; a wrong extension is common in collections from the web.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF")
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_JPEG: dict[str, Any] = {"format": "JPEG", "quality": 95, "subsampling": 0}


def image_of(metadata: Mapping[str, Any]) -> bool:
    """Whether a stored clip is an image, by its metadata."""
    return metadata.get("image") is True


def read_image(source: Path | bytes) -> np.ndarray:
    """The pixels of an image file; of several images in one file the first.

    Grey, palette and CMYK become RGB, of 16 bits the upper 8 count, EXIF's orientation is applied, and alpha is
    left out: the colours are those that the file stores. Raises VideoError with the reason, also for a file that
    breaks off.
    """
    try:
        # The warning comes at half the size that Pillow refuses.
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS)
            with image:
                image.load()
                upright = _UPRIGHT.get(_orientation(image))
                pixels = _rgb(image)
    except VideoError:
        raise
    except Exception as error:  # of any kind: Pillow's readers of damaged files promise none
        raise VideoError(_reason(source, error)) from None
    if upright is None:
        return pixels
    return np.array(Image.fromarray(pixels).transpose(upright))


def write_image(pixels: np.ndarray, path: Path) -> None:
    """Write uint8 [H, W, 3] or [H, W] as a PNG, or as a JPEG with full colour resolution, as the suffix says."""
    Image.fromarray(pixels).save(path, **({"format": "PNG"} if path.suffix == ".png" else _JPEG))


def shrunk(pixels: np.ndarray, short_side: int) -> np.ndarray:
    """The image with its shorter side at most `short_side`, never enlarged: bicubic with antialias."""
    height, width = pixels.shape[:2]
    scale = short_side / min(height, width)
    if scale >= 1:
        return pixels
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a broken EXIF block says nothing, and the picture beside it is whole
        return 1


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "F":
        raise VideoError("its pixels are floating-point numbers, whose range is not known")
    if image.mode.startswith("I"):  # Pillow's own conversion cuts off at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise VideoError("its pixels have more than 16 bits")
        return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    image.info.pop("transparency", None)  # a colour that stands for transparent is a colour here
    return np.array(image.convert("RGB"))


def _reason(source: Path | bytes, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return f"the file cannot be read ({error.strerror})"
    known = wrong_content(source, "an image")
    if known is not None:
        return known
    if isinstance(error, Image.DecompressionBombError):
        return f"the image is too large ({error})"
    if isinstance(error, UnidentifiedImageError):
        return f"not an image of a known format ({', '.join(_FORMATS)})"
    return f"the image does not decode ({str(error) or type(error).__name__})"
