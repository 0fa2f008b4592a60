"""The generated long videos stand for the real rows that they are to be cut by."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from tests import epic_videos


@pytest.mark.parametrize(
    ("file", "until_s", "counts"),
    [
        ("EPIC_100_uda_source_train.csv", epic_videos.TRAIN_UNTIL_S, {"P02_05": 5, "P01_08": 14}),
        ("EPIC_100_validation.csv", epic_videos.VAL_UNTIL_S, {"P03_26": 4, "P18_04": 7}),
    ],
)
def test_long_videos_hold_their_rows(
    tmp_path: Path, test_data: Path, file: str, until_s: dict[str, float], counts: dict[str, int]
) -> None:
    source = test_data / "annotations" / "epic_kitchens_100" / file
    rows = epic_videos.rows_of(source, until_s)
    found = {name: [row for row in rows if row["video_id"] == name] for name in counts}
    assert {name: len(rows) for name, rows in found.items()} == counts
    epic_videos.write_rows(tmp_path / "rows.csv", rows)
    lines = source.read_text().splitlines()
    assert set((tmp_path / "rows.csv").read_text().splitlines()) <= set(lines)
    for name, of_video in found.items():
        path = tmp_path / f"{name}.MP4"
        epic_videos.write_long_video(path, of_video)
        last_s = max(epic_videos.seconds(row["stop_timestamp"]) for row in of_video)
        with av.open(str(path)) as container:
            video, track = container.streams.video[0], container.streams.audio[0]
            for stream in (video, track):
                assert stream.duration is not None
                assert stream.time_base is not None
                assert last_s < float(stream.duration * stream.time_base) < last_s + 2
            pictures = np.stack([frame.to_ndarray(format="gray") for frame in container.decode(video)])
        for row in of_video:
            middle = (epic_videos.seconds(row["start_timestamp"]) + epic_videos.seconds(row["stop_timestamp"])) / 2
            assert pictures[int(middle * epic_videos.FPS)].std() > 8  # a figure, not the grey between rows
