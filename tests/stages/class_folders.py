"""Small videos in class folders, and what the tests of the shard stage look at."""

from __future__ import annotations

from pathlib import Path

from mdltool.artifact import Artifact
from mdltool.stages.shard import Dataset
from tests.data.tiny_shards import make_video

CLIPS = 24
SMALL = 12_000  # bytes of a shard: several clips, several shards


def make_videos(folder: Path) -> Path:
    """24 videos of 8 to 31 frames in two class folders."""
    for number in range(CLIPS):
        path = folder / ("wave", "box")[number % 2] / f"clip.{number:02d}.MP4"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(make_video(8 + number))
    return folder


def dataset(videos: Path) -> Dataset:
    return Dataset(videos, "folder", "d", "train")


def contents(artifact: Artifact) -> dict[str, bytes]:
    return {name: (artifact.path / name).read_bytes() for name in artifact.files}
