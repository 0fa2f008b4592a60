"""Images decode to their known pixels, as clips of one frame, or fail with the true reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mdltool.data.decode import decode
from mdltool.data.image import read_image, shrunk
from mdltool.data.sampling import INDEX, SHORT, Sampling, clip_indices, random_start, view_starts
from mdltool.data.video import Timeline, VideoError
from mdltool.evaluate.views import ViewSpec, load_views
from tests.images import encoded, pixels

RGB = pixels()


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_files_give_their_pixels(form: str) -> None:
    assert np.array_equal(read_image(encoded(RGB, form)), RGB)


def test_jpeg_is_full_range_and_close_to_what_was_stored() -> None:
    flat = np.full((16, 16, 3), (255, 128, 3), np.uint8)
    assert np.abs(read_image(encoded(flat, "JPEG", quality=95)).astype(int) - flat).max() <= 2


def test_grey_one_bit_and_16_bit_become_rgb() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(read_image(encoded(levels)), grey(levels))
    assert np.array_equal(read_image(encoded(levels.astype(np.uint16) << 8 | 77)), grey(levels))
    checks = (np.indices((8, 8)).sum(0) % 2).astype(bool)
    assert np.array_equal(read_image(encoded(Image.fromarray(checks))), grey(checks.astype(np.uint8) * 255))


def test_palette_and_alpha_give_the_colours_that_are_stored() -> None:
    few = np.array([[[9, 8, 7], [200, 100, 50]]] * 4, np.uint8)
    palette = Image.fromarray(few).quantize(2)
    assert np.array_equal(read_image(encoded(palette, transparency=bytes([0, 255]))), few)
    clear = np.dstack([RGB, np.zeros(RGB.shape[:2], np.uint8)])
    assert np.array_equal(read_image(encoded(clear)), RGB)


def test_cmyk_jpeg_is_not_inverted() -> None:
    red = Image.new("RGB", (16, 16), (250, 10, 10)).convert("CMYK")
    assert np.abs(read_image(encoded(red, "JPEG", quality=95)).astype(int) - (250, 10, 10)).max() <= 4


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (2, RGB[:, ::-1]),
        (3, RGB[::-1, ::-1]),
        (4, RGB[::-1]),
        (5, RGB.transpose(1, 0, 2)),
        (6, np.rot90(RGB, -1)),
        (7, RGB[::-1, ::-1].transpose(1, 0, 2)),
        (8, np.rot90(RGB)),
        (9, RGB),
    ],
)
def test_exif_orientation_is_applied(orientation: int, turned: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(read_image(encoded(RGB, "PNG", exif=exif)), turned)
    jpeg = encoded(RGB, "JPEG", quality=95, subsampling=0, exif=exif)
    assert np.abs(read_image(jpeg).astype(int) - turned).mean() < 8


def test_broken_exif_costs_nothing() -> None:
    block = b"Exif\0\0" + b"no TIFF header here"
    assert read_image(encoded(RGB, "JPEG", exif=block)).shape == RGB.shape


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
JPEG, PNG = encoded(NOISE, "JPEG"), encoded(NOISE)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not an image"),
        (b"<!doctype html><html>", "an HTML page, not an image"),
        (b"plain text", "not an image of a known format"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (JPEG[:100], "does not decode"),
        (PNG[: len(PNG) // 2], "truncated"),
        (PNG[:2000] + bytes(100) + PNG[2100:], "does not decode"),
        (encoded(np.zeros((4, 4), np.float32), "TIFF"), "floating-point"),
        (encoded(np.full((4, 4), 1 << 20, np.int32), "TIFF"), "more than 16 bits"),
    ],
)
def test_what_cannot_be_used_says_why(content: bytes, reason: str) -> None:
    with pytest.raises(VideoError, match=reason):
        read_image(content)


def test_a_size_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    # The header promises 40,000 x 40,000 pixels; nothing is decoded to find out.
    header = encoded(Image.new("1", (8, 8)))
    size = (40_000).to_bytes(4, "big") * 2
    body = header[12:16] + size + header[24:29]
    import zlib

    forged = header[:12] + body + zlib.crc32(body).to_bytes(4, "big") + header[33:]
    with pytest.raises(VideoError, match="too large"):
        read_image(forged)
    with pytest.raises(VideoError, match="cannot be read"):
        read_image(tmp_path / "none.png")


def test_shrinking_keeps_the_shape_and_never_enlarges() -> None:
    assert shrunk(RGB, 20).shape == (20, 28, 3)
    assert shrunk(RGB, 40) is RGB
    assert shrunk(np.zeros((3, 500, 3), np.uint8), 2).shape == (2, 333, 3)


def test_one_function_decodes_images_and_videos(tmp_path: Path) -> None:
    path = tmp_path / "a.PNG"
    path.write_bytes(encoded(RGB))
    for source, image in ((path, None), (path.read_bytes(), True)):
        decoded = decode(source, lambda timeline: [0] * len(timeline), image=image)
        assert decoded.frames.shape == (1, 3, 40, 56)
        assert np.array_equal(decoded.frames[0].permute(1, 2, 0).numpy(), RGB)
        assert (decoded.backend, decoded.timeline.duration_s) == ("pillow", 0.0)


SAMPLINGS = [
    Sampling(4, None if i in ("stride", "segments") else 2.0, short, i, 3 if i == "stride" else None)
    for i in INDEX
    for short in SHORT
    if (i, short) != ("stride", "stretch")
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: f"{s.index}-{s.short}")
def test_every_rule_takes_the_one_frame_of_an_image(sampling: Sampling) -> None:
    timeline, rng = Timeline(np.zeros(1), 0.0), np.random.default_rng(0)
    start_s = random_start(timeline.duration_s, sampling.span_s(timeline), rng)
    assert clip_indices(timeline, start_s, sampling, rng).tolist() == [0, 0, 0, 0]
    assert view_starts(0.0, sampling.span_s(timeline), 3) == [0.0, 0.0, 0.0]


def test_views_of_an_image_are_its_crops(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(RGB))
    views = load_views(path, ViewSpec(2, 3, Sampling(1, 1.0), short_side=40, crop=32))
    assert views.frames.shape == (6, 3, 1, 32, 32)
    assert (views.distinct, views.backend) == (3, "pillow")
    assert np.array_equal(views.frames[1, :, 0].permute(1, 2, 0).numpy(), RGB[4:36, 12:44])
