"""Streams of embeddings: each clip's own, whole and padded, or a message that says what the shards hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mdltool.data.index import ShardIndex
from mdltool.data.loader import Stream, TrainLoader, ViewLoader
from mdltool.data.order import InTurn, Mixed, Order
from mdltool.data.sampling import Sampling
from mdltool.data.transforms import TrainTransform
from mdltool.errors import MdlError
from mdltool.evaluate.views import ViewSpec
from mdltool.types import Batch
from tests.data.tiny_shards import make_video, write_shards

SAMPLING = Sampling(4, 0.5)
TRANSFORM = TrainTransform((34, 48), 32, 0.5)
BROKEN = 2  # does not decode


def tokens(clip: int, width: int = 3) -> np.ndarray:
    """As many tokens as the clip's number modulo 4, which show that number."""
    return np.full((clip % 4, width), clip, np.float16)


@pytest.fixture(scope="module")
def indices(tmp_path_factory: pytest.TempPathFactory) -> list[ShardIndex]:
    """One: 6 clips with `audio`, none in the fifth, and `speech`. Two: 3 clips without streams."""
    folder = tmp_path_factory.mktemp("streams")
    video = make_video(12)
    streams = {
        "audio": [tokens(i) if i != 4 else None for i in range(6)],
        "speech": [np.full((1, 2), -i, np.float32) for i in range(6)],
    }
    videos = [video if i != BROKEN else b"\0" * 900 for i in range(6)]
    one = write_shards(folder / "one", videos, domain="one", streams=streams)
    two = write_shards(folder / "two", [video] * 3, domain="two")
    return [ShardIndex.open(one), ShardIndex.open(two)]


def batches(streams: list[Stream], order: Order, workers: int = 0) -> list[Batch]:
    return list(TrainLoader(streams, order, seed=0, workers=workers, updates=range(3)))


def clip_of(key: str) -> int:
    return int(key.partition("/")[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_carry_each_clips_tokens(indices: list[ShardIndex], workers: int) -> None:
    stream = Stream(indices[0], SAMPLING, TRANSFORM, {"audio": 3, "speech": 2})
    found = batches([stream], InTurn({"one": 6}, {"one": 4}, 0), workers)
    assert any(batch.skipped for batch in found), "a clip was passed over"
    for batch in found:
        audio, speech = batch.streams["audio"], batch.streams["speech"]
        wanted = [tokens(clip_of(key)) if clip_of(key) != 4 else tokens(0) for key in batch.keys]
        assert audio.mask_BM.sum(1).tolist() == [len(array) for array in wanted]
        for array, row_MD, mask_M in zip(wanted, audio.tokens_BMD, audio.mask_BM, strict=True):
            assert torch.equal(row_MD[mask_M], torch.from_numpy(array).float())
            assert not row_MD[~mask_M].any()
        assert speech.tokens_BMD[:, 0, 0].tolist() == [-clip_of(key) for key in batch.keys]


def test_mixed_batches_hold_domains_without_a_stream(indices: list[ShardIndex]) -> None:
    streams = [Stream(indices[0], SAMPLING, TRANSFORM, {"audio": 3}), Stream(indices[1], SAMPLING, TRANSFORM)]
    for batch in batches(streams, Mixed({"one": 6, "two": 3}, 4, 0)):
        present = batch.streams["audio"].mask_BM.any(1)
        assert batch.domain_B is not None
        assert not present[batch.domain_B == 1].any()


def test_absent_everywhere_is_one_masked_token(indices: list[ShardIndex]) -> None:
    index = indices[0].take(np.array([4, 0]))
    (batch,) = batches([Stream(index, SAMPLING, TRANSFORM, {"audio": 3})], InTurn({"one": 2}, {"one": 2}, 0))[:1]
    assert batch.streams["audio"].tokens_BMD.shape == (2, 1, 3)
    assert not batch.streams["audio"].mask_BM.any()


def test_without_modalities_there_are_none(indices: list[ShardIndex]) -> None:
    assert all(
        not batch.streams
        for batch in batches([Stream(indices[0], SAMPLING, TRANSFORM)], InTurn({"one": 6}, {"one": 4}, 0))
    )


def test_views_carry_them_too(indices: list[ShardIndex]) -> None:
    spec = ViewSpec(2, 1, SAMPLING, 36, 32)
    clips = list(ViewLoader(indices[0], spec, workers=0, modalities={"audio": 3}))
    assert [len(clip.streams["audio"]) for clip in clips] == [0, 1, 2, 3, 0, 1]
    assert clips[3].streams["audio"].dtype == torch.float32
    assert clips[BROKEN].views is None


def test_raw_streams_are_not_read(indices: list[ShardIndex]) -> None:
    assert set(indices[0].read(1)) == {"mp4", "json", "audio.npy", "speech.npy"}
    assert set(indices[0].read(1, raw=True)) == {*indices[0].read(1), "audio.flac", "speech.flac"}


def test_says_what_the_shards_hold(indices: list[ShardIndex]) -> None:
    with pytest.raises(
        MdlError, match=r"one/train have no stream 'flow' \(they have: audio \(audio, 3 wide\)"
    ) as told:
        batches([Stream(indices[0], SAMPLING, TRANSFORM, {"flow": 8})], InTurn({"one": 6}, {"one": 2}, 0))
    assert "--modality flow" in str(told.value)
    with pytest.raises(MdlError, match=r"two/train have no stream 'audio' \(they have: none"):
        batches([Stream(indices[1], SAMPLING, TRANSFORM, {"audio": 3})], InTurn({"two": 3}, {"two": 2}, 0))


def test_scoring_goes_without_what_is_not_there(
    indices: list[ShardIndex], capsys: pytest.CaptureFixture[str]
) -> None:
    clips = list(ViewLoader(indices[1], ViewSpec(1, 1, SAMPLING, 36, 32), workers=0, modalities={"audio": 3}))
    assert [clip.streams["audio"].shape for clip in clips] == [(0, 3)] * 3
    assert "two/train has the stream 'audio': they are scored without it" in capsys.readouterr().err
    with pytest.raises(MdlError, match="'audio' is 3 wide in the shards one/train, 4 in the recipe"):
        ViewLoader(indices[0], ViewSpec(1, 1, SAMPLING, 36, 32), workers=0, modalities={"audio": 4})


def test_wrong_widths(indices: list[ShardIndex], tmp_path: Path) -> None:
    with pytest.raises(MdlError, match="'audio' is 3 wide in the shards one/train, 512 in the recipe"):
        batches([Stream(indices[0], SAMPLING, TRANSFORM, {"audio": 512})], InTurn({"one": 6}, {"one": 2}, 0))
    wide = ShardIndex.open(
        write_shards(tmp_path / "w", [make_video(12)], domain="w", streams={"audio": [tokens(1, 5)]})
    )
    streams = [
        Stream(indices[0], SAMPLING, TRANSFORM, {"audio": 3}),
        Stream(wide, SAMPLING, TRANSFORM, {"audio": 5}),
    ]
    with pytest.raises(MdlError, match="'audio' is 3 wide in one and 5 in w"):
        batches(streams, InTurn({"one": 6, "w": 1}, {"one": 1, "w": 1}, 0))


def test_a_damaged_array_is_named(tmp_path: Path) -> None:
    arrays: list[np.ndarray | None] = [np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32)]
    index = ShardIndex.open(write_shards(tmp_path / "s", [make_video(12)] * 2, streams={"audio": arrays}))
    with pytest.raises(
        MdlError, match=r"'audio' of 'clip/001' is float32 \[2, 4\], not float16 or float32 \[M, 3\]"
    ):
        index.clip_and_streams(1, {"audio": 3})


def npy(header: str, data: bytes = b"") -> bytes:
    content = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(content).to_bytes(2, "little") + content + data


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000, 3)}"), "not the rows"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 3)}", bytes(12)), "not the rows"),
        (npy("{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3)}", bytes(24)), "not the rows"),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (2, 3)}", bytes(48)), r"is object \[2, 3\]"),
        (npy("{'descr': ("), "no array"),
        (npy("(" * 3000), "no array"),
        (b"PK\x03\x04", "no array"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 3)}", b"\0\0\xc0\x7f" * 3), "not finite"),
    ],
)
def test_a_hostile_array_is_damage(
    content: bytes, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = {"audio": [np.zeros((2, 3), np.float32)]}
    index = ShardIndex.open(write_shards(tmp_path / "s", [b"video"], streams=dict(arrays)))
    members = {**index.read(0), "audio.npy": content}
    monkeypatch.setattr(ShardIndex, "read", lambda *_: members)
    with pytest.raises(MdlError, match=rf"damaged: .*'audio'.* {what}"):
        index.clip_and_streams(0, {"audio": 3})


@pytest.mark.parametrize("rows", ["0", "1", "True"])
def test_what_numpy_reads_is_read(rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {"audio": [np.zeros((2, 3), np.float32)]}
    index = ShardIndex.open(write_shards(tmp_path / "s", [b"video"], streams=dict(arrays)))
    count = int(rows != "0")
    content = npy(f"{{'descr': '<f2', 'fortran_order': False, 'shape': ({rows}, 3)}}", bytes(6 * count))
    members = {**index.read(0), "audio.npy": content}
    monkeypatch.setattr(ShardIndex, "read", lambda *_: members)
    assert index.clip_and_streams(0, {"audio": 3})[2]["audio"].shape == (count, 3)
