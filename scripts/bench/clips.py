"""Clips for the benchmarks: H.264 at the size and bit rate of Kinetics, made here."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT, SECONDS, BITS_PER_SECOND = 340, 256, 10, 500_000


def write_clip(path: Path, *, gop: int = 250, rate: int = 30, seed: int = 0) -> Path:
    """Ten seconds of a textured scene under a moving camera, with figures and sensor noise."""
    rng = np.random.default_rng(seed)
    scene = sum(
        np.kron(rng.normal(0, 40 / k, (40 * k, 60 * k, 3)), np.ones((16 // k, 16 // k, 1))) for k in (1, 2, 4)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=rate, options={"g": str(gop), "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.bit_rate = BITS_PER_SECOND
        for number in range(SECONDS * rate):
            y, x = (round(60 + 50 * np.sin(number / rate + phase)) for phase in (seed, seed + 2))
            image = 128 + scene[y : y + HEIGHT, x : x + WIDTH] + rng.normal(0, 3, (HEIGHT, WIDTH, 1))
            at = number * 90 // rate % (WIDTH - 60)
            image[90:200, at : at + 50] = rng.normal(160, 12, 3)
            image[40:140, WIDTH - 50 - at : WIDTH - at] += 60
            frame = av.VideoFrame.from_ndarray(image.clip(0, 255).astype(np.uint8), "rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path
