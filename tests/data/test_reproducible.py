"""Encoded bytes depend on the frames alone, not on what the process's memory held before."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np

from mdltool.data import synth
from mdltool.data.encode import Encoding, encode

SIZES = ((112, 112), (80, 64), (176, 144), (240, 180))


def _source(path: Path, width: int, height: int) -> Path:
    """Half a second of a picture that slides, lossless."""
    rng = np.random.default_rng(0)
    picture = np.kron(rng.integers(0, 255, (40, 40, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("ffv1", rate=24)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(12):
            frame = np.roll(picture, 3 * number, 1)[:height, :width]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))
        container.mux(stream.encode())
    return path


def write_everything(folder: Path) -> str:
    """The digest of what `synth` and `shard --encode` write; called in processes of their own."""
    digest = hashlib.sha256()
    for width, height in SIZES:
        source = _source(folder / f"{width}.mkv", width, height)
        for mode in ("h264", "jpeg"):
            digest.update(encode(source, None, None, Encoding(mode), folder / str(width)).read_bytes())
    synth.write_domains(folder / "clips", ["dusk"], 1, seed=0, splits=["train"], workers=1)
    for path in sorted((folder / "clips").rglob("*.mp4")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def test_bytes_do_not_depend_on_what_memory_held(tmp_path: Path) -> None:
    made = set()
    for fill in ("85", "170"):  # what malloc fills its memory with; no large blocks fresh from the system
        folder = tmp_path / fill
        folder.mkdir()
        environment = {**os.environ, "MALLOC_PERTURB_": fill, "MALLOC_MMAP_THRESHOLD_": str(2**30)}
        command = [sys.executable, "-m", "tests.data.test_reproducible", str(folder)]
        made.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(made) == 1


if __name__ == "__main__":
    sys.stdout.write(write_everything(Path(sys.argv[1])))
