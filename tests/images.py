"""Small images with known pixels, as files and arrays."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def pixels(seed: int = 0, height: int = 40, width: int = 56) -> np.ndarray:
    """uint8 [H, W, 3]: smooth colours that differ in every corner."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    ramps = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (height + width)], -1)
    return ((ramps + rng.integers(0, 255, 3)) % 256).astype(np.uint8)


def encoded(image: np.ndarray | Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """The file's bytes."""
    target = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(target, form, **options)
    return target.getvalue()


def write_images(folder: Path, *names: str, **options: Any) -> Path:
    """One image at each of the paths, told apart by its colours; returns the folder."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        form = "PNG" if path.suffix == ".png" else "JPEG"
        path.write_bytes(encoded(pixels(number), form, **options))
    return folder
