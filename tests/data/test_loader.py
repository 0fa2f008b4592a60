"""The loader's promises: the position alone decides the clip and its pixels, whatever reads it."""

from __future__ import annotations

import collections
import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from mdltool.data import ahead
from mdltool.data import loader as loader_module
from mdltool.data.index import ShardIndex
from mdltool.data.loader import ClipViews, Stream, TrainLoader, ViewLoader, epoch_order
from mdltool.data.order import InTurn, Mixed, Order, Share
from mdltool.data.sampling import Sampling
from mdltool.data.transforms import TrainTransform
from mdltool.errors import MdlError
from mdltool.evaluate.views import ViewSpec, load_views
from mdltool.types import Batch
from tests.data.tiny_shards import make_video, write_shards

SAMPLING = Sampling(4, 0.5)
TRANSFORM = TrainTransform((34, 48), 32, 0.5)
SPEC = ViewSpec(2, 3, SAMPLING, 36, 32)


@pytest.fixture(scope="module")
def indices(tmp_path_factory: pytest.TempPathFactory) -> list[ShardIndex]:
    """Two domains, of 11 clips in 4 shards and of 5 clips in 2."""
    folder = tmp_path_factory.mktemp("shards")
    videos = [make_video(12 + 3 * i, size=(64, 48), rate=25 + i) for i in range(11)]
    return [
        ShardIndex.open(write_shards(folder / "one", videos, per_shard=3, domain="one", trims={2: (0.2, 0.5)})),
        ShardIndex.open(write_shards(folder / "two", videos[4:9], per_shard=3, domain="two")),
    ]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """6 clips, of which the numbers 1, 2 and 4 do not decode."""
    videos = [make_video(20) if i in (0, 3, 5) else b"\0" * 900 for i in range(6)]
    return ShardIndex.open(write_shards(tmp_path_factory.mktemp("broken") / "broken", videos, domain="broken"))


def batches(
    indices: Sequence[ShardIndex],
    updates: int = 4,
    batch: int = 4,
    *,
    seed: int = 0,
    workers: int = 0,
    start_update: int = 0,
    share: Share | None = None,
    order: Order | None = None,
    domain_order: str = "sequential",
    rounds: int = 1,
) -> list[Batch]:
    clips = {index.domain: len(index) for index in indices}
    order = order or InTurn(clips, dict.fromkeys(clips, batch), seed, domain_order, rounds)
    loader = TrainLoader(
        [Stream(index, SAMPLING, TRANSFORM) for index in indices],
        order,
        seed=seed,
        workers=workers,
        updates=range(start_update, updates),
        share=share,
    )
    return list(loader)


def assert_same(given: Sequence[Batch], wanted: Sequence[Batch]) -> None:
    assert len(given) == len(wanted) > 0
    for a, b in zip(given, wanted, strict=True):
        assert (a.domain, a.keys, a.positions, a.skipped) == (b.domain, b.keys, b.positions, b.skipped)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.frames, b.frames)


def test_batches_are_whole_clips_with_their_labels(indices: list[ShardIndex]) -> None:
    for number, batch in enumerate(batches(indices)):
        index = indices[number % 2]
        assert batch.domain == index.domain
        assert batch.frames.shape == (4, 3, 4, 32, 32)
        assert batch.frames.dtype == torch.uint8
        assert batch.labels.tolist() == [index.labels[index.keys.index(key)] for key in batch.keys]
        assert batch.positions == list(range(number // 2 * 4, number // 2 * 4 + 4))
        assert batch.skipped == []


def test_flipped_clips_have_the_labels_of_their_mirror_images(tmp_path: Path) -> None:
    videos = [make_video(12) for _ in range(4)]
    classes = ("push left", "push right", "turn left", "fold")
    index = ShardIndex.open(write_shards(tmp_path / "s", videos, classes=classes, domain="s"))

    def batch(flip: float, swap_sides: bool) -> Batch:
        stream = Stream(index, SAMPLING, TrainTransform((34, 48), 32, flip), swap_sides=swap_sides)
        (found,) = TrainLoader([stream], InTurn({"s": 4}, {"s": 4}, 0), seed=0, workers=0, updates=range(1))
        return found

    plain, swapped, literal = batch(0.0, True), batch(1.0, True), batch(1.0, False)
    assert literal.labels.tolist() == plain.labels.tolist()
    for row, label in enumerate(plain.labels.tolist()):
        assert swapped.labels[row] == {0: 1, 1: 0, 2: 2, 3: 3}[label]
        expected = plain if label == 2 else literal  # turn right is no class
        assert torch.equal(swapped.frames[row], expected.frames[row])
        assert not torch.equal(plain.frames[row], literal.frames[row])


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_change_nothing(indices: list[ShardIndex], workers: int) -> None:
    assert_same(batches(indices, workers=workers), batches(indices))


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_each_batch(indices: list[ShardIndex], world: int) -> None:
    whole = batches(indices, batch=6, updates=3)
    parts = [batches(indices, batch=6, updates=3, share=Share(rank, world)) for rank in range(world)]
    for number, batch in enumerate(whole):
        shares = [part[number] for part in parts]
        assert all(share.domain == batch.domain for share in shares)
        assert [share.positions for share in shares] == [batch.positions[rank::world] for rank in range(world)]
        for rank, share in enumerate(shares):
            assert share.keys == batch.keys[rank::world]
            assert torch.equal(share.frames, batch.frames[rank::world])


@pytest.mark.parametrize(("per_shard", "world", "workers"), [(11, 2, 2), (4, 3, 2), (1, 4, 1)])
def test_every_process_takes_as_many_steps_whatever_the_shards(
    per_shard: int, world: int, workers: int, tmp_path: Path
) -> None:
    """One shard for four readers, three for six, eleven for four; a batch that they do not divide."""
    videos = [make_video(12) for _ in range(11)]
    index = ShardIndex.open(write_shards(tmp_path / "s", videos, per_shard=per_shard, domain="one"))
    parts = [
        batches([index], updates=4, batch=7, workers=workers, share=Share(rank, world)) for rank in range(world)
    ]
    assert [len(part) for part in parts] == [4] * world
    for number, shares in enumerate(zip(*parts, strict=True)):
        positions = sorted(position for share in shares for position in share.positions)
        assert positions == list(range(7 * number, 7 * number + 7))


@pytest.mark.parametrize("order", ["sequential", "shuffled", "random"])
def test_starting_anywhere_continues_the_undisturbed_run(indices: list[ShardIndex], order: str) -> None:
    whole = batches(indices, updates=6, domain_order=order, rounds=2, batch=2)
    for start in range(6):
        rest = batches(indices, updates=6, domain_order=order, rounds=2, batch=2, start_update=start)
        assert_same(rest, whole[start * 4 :])
    assert_same(
        batches(indices, updates=6, domain_order=order, rounds=2, batch=2, start_update=5, workers=2),
        whole[20:],
    )


def test_each_permutation_has_every_clip_once(indices: list[ShardIndex]) -> None:
    keys = [key for batch in batches([indices[0]], updates=11, batch=3) for key in batch.keys]
    for epoch in range(3):
        assert sorted(keys[11 * epoch : 11 * epoch + 11]) == sorted(indices[0].keys)
    assert keys[:11] != keys[11:22] != keys[22:33]


def test_copies_are_augmented_apart_and_decoded_once(
    indices: list[ShardIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def counting(*args: object, **options: object) -> object:
        opened.append(1)
        return loader_module_decode(*args, **options)  # type: ignore[arg-type]

    loader_module_decode = loader_module.decode
    monkeypatch.setattr(loader_module, "decode", counting)
    clips = {index.domain: len(index) for index in indices}
    order = Mixed(clips, 4, seed=0, repeat=2)
    for batch in batches(indices, updates=3, order=order):
        for first in range(0, 8, 2):
            assert batch.keys[first] == batch.keys[first + 1]
            assert not torch.equal(batch.frames[first], batch.frames[first + 1])
    assert len(opened) == 3 * 4


def test_a_domain_smaller_than_its_batch(indices: list[ShardIndex]) -> None:
    (batch,) = batches([indices[1]], updates=1, batch=12)
    for epoch in range(2):
        assert sorted(batch.keys[5 * epoch : 5 * epoch + 5]) == sorted(indices[1].keys)
    first, second = (batch.frames[[i for i, k in enumerate(batch.keys) if k == batch.keys[0]]][j] for j in (0, 1))
    assert not torch.equal(first, second)  # the same clip at two positions is augmented anew


def test_the_seed_decides(indices: list[ShardIndex]) -> None:
    assert_same(batches(indices, seed=3), batches(indices, seed=3))
    assert any(a.keys != b.keys for a, b in zip(batches(indices, seed=3), batches(indices, seed=4), strict=True))


def test_domains_of_one_length_are_permuted_apart(tmp_path: Path) -> None:
    # names that share their first eight letters, as kinetics400 and kinetics600 do
    names = ("kinetics400", "kinetics600")
    videos = [b"x"] * 40
    orders = [
        epoch_order(ShardIndex.open(write_shards(tmp_path / name, videos, domain=name)), 0, 0) for name in names
    ]
    assert not np.array_equal(*orders)


def test_epoch_order_is_pure_and_stays_within_its_window(tmp_path: Path) -> None:
    index = ShardIndex.open(write_shards(tmp_path / "many", [b"x"] * 60, per_shard=3))
    order = epoch_order(index, 0, 5, window=4)
    assert np.array_equal(order, epoch_order(index, 0, 5, window=4))
    assert sorted(order.tolist()) == list(range(60))
    assert not np.array_equal(order, epoch_order(index, 0, 6, window=4))
    shards = index.shard_of[order]
    for first in range(0, 60, 12):
        inside = shards[first : first + 12].tolist()
        assert len(set(inside)) == 4  # four shards at a time
        assert inside != sorted(inside)  # mixed
    assert epoch_order(index, 0, 5, window=1).tolist() != sorted(order.tolist())
    assert all(
        len(set(index.shard_of[epoch_order(index, 0, 5, window=1)][i : i + 3])) == 1 for i in range(0, 60, 3)
    )


def test_domain_orders_are_common_to_all_processes(indices: list[ShardIndex]) -> None:
    for order in ("shuffled", "random"):
        runs = [
            [b.domain for b in batches(indices, updates=10, batch=2, domain_order=order, share=Share(rank, 2))]
            for rank in (0, 1)
        ]
        assert runs[0] == runs[1]
        rounds = {tuple(runs[0][i : i + 2]) for i in range(0, 20, 2)}
        assert len(rounds) > 1
        assert order == "random" or rounds == {("one", "two"), ("two", "one")}


def test_positions_advance_only_when_a_domain_is_drawn(indices: list[ShardIndex]) -> None:
    taken = collections.Counter[str]()
    for batch in batches(indices, updates=10, batch=2, domain_order="random"):
        assert batch.positions == [2 * taken[batch.domain], 2 * taken[batch.domain] + 1]
        taken[batch.domain] += 1


@pytest.mark.parametrize("workers", [0, 2])
def test_clips_that_do_not_decode_give_way_to_the_next(broken: ShardIndex, workers: int) -> None:
    bad = {broken.keys[i] for i in (1, 2, 4)}
    order = [broken.keys[i] for i in epoch_order(broken, 0, 0)]
    for position, batch in enumerate(batches([broken], updates=6, batch=1, workers=workers)):
        to_come = order[position:] + order[:position]
        steps = next(step for step, key in enumerate(to_come) if key not in bad)
        assert batch.keys == [to_come[steps]]
        assert batch.labels.tolist() == [broken.labels[broken.keys.index(to_come[steps])]]
        assert [key for key, _ in batch.skipped] == to_come[:steps]
        assert all("cannot open" in reason for _, reason in batch.skipped)
    (whole,) = batches([broken], updates=1, batch=6, workers=workers)
    assert {key for key, _ in whole.skipped} == bad
    assert len(whole.frames) == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_without_a_good_clip_end_the_run(tmp_path: Path, workers: int) -> None:
    index = ShardIndex.open(write_shards(tmp_path / "bad", [b"\0" * 900] * 3, domain="bad"))
    with pytest.raises(MdlError) as caught:
        batches([index], workers=workers)
    assert caught.value.what.startswith("no clip of bad can be decoded (clip/")
    assert caught.value.where == str(index.folder)
    assert caught.value.fix is not None


def test_damaged_shards_end_the_run_with_their_own_message(tmp_path: Path) -> None:
    index = ShardIndex.open(write_shards(tmp_path / "cut", [make_video(8)] * 3, domain="cut"))
    path = index.folder / index.files[0]
    path.write_bytes(path.read_bytes()[: int(index.offsets[1])])
    for workers in (0, 1):
        with pytest.raises(MdlError, match="these shards are damaged") as caught:
            batches([index], workers=workers)
        assert "Traceback" not in str(caught.value)


def test_impossible_requests_are_refused(indices: list[ShardIndex], tmp_path: Path) -> None:
    empty = ShardIndex.open(write_shards(tmp_path / "empty", [], domain="empty"))
    with pytest.raises(MdlError, match="hold no clips"):
        batches([empty])
    with pytest.raises(MdlError, match="cannot be shared by 8 processes"):
        batches(indices, batch=4, share=Share(0, 8))
    with pytest.raises(MdlError, match="domain_order"):
        batches(indices, domain_order="reversed")


def test_surplus_workers_idle_and_are_announced_once(
    indices: list[ShardIndex], capsys: pytest.CaptureFixture[str]
) -> None:
    ahead._announce_idle.cache_clear()
    for _ in range(2):
        assert_same(batches([indices[1]], updates=2, workers=5), batches([indices[1]], updates=2))
    assert capsys.readouterr().err == "3 of 5 workers have nothing to read (2 batches) and idle\n"


def test_iterating_leaves_the_global_generator_alone(indices: list[ShardIndex]) -> None:
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    batches(indices, updates=1)
    batches(indices, updates=1, workers=1)
    assert torch.equal(torch.rand(1), wanted)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_clip_is_viewed_once(indices: list[ShardIndex], workers: int, world: int) -> None:
    index = indices[0]
    parts = [list(ViewLoader(index, SPEC, workers=workers, rank=rank, world=world)) for rank in range(world)]
    assert sorted(clip.key for part in parts for clip in part) == sorted(index.keys)
    for clip in itertools.chain(*parts):
        number = index.keys.index(clip.key)
        _, video = index.clip(number)
        assert clip.error is None
        assert clip.views is not None
        wanted = load_views(video, SPEC, trim=(0.2, 0.5) if number == 2 else None, key=clip.key)
        assert torch.equal(clip.views.frames, wanted.frames)
        assert (clip.views.distinct, clip.views.backend) == (wanted.distinct, wanted.backend)


def test_clips_that_do_not_decode_are_listed(broken: ShardIndex) -> None:
    given: list[ClipViews] = list(ViewLoader(broken, SPEC, workers=1))
    assert [clip.key for clip in given] == broken.keys
    assert [clip.views is None for clip in given] == [False, True, True, False, True, False]
    assert all("cannot open" in (clip.error or "") for clip in given if clip.views is None)


SIGNALLED = """
import os, signal, sys, pickle
from mdltool.data.loader import ViewLoader
index, spec = pickle.load(open(sys.argv[1], "rb"))
seen = []
for clip in ViewLoader(index, spec, workers=2):
    if not seen:  # what a cluster sends goes to the whole group
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
            os.killpg(os.getpgrp(), number)
    seen.append(clip.key)
print(len(seen))
"""


def test_workers_ignore_the_signals_that_the_trainer_answers(indices: list[ShardIndex], tmp_path: Path) -> None:
    path = tmp_path / "loader.pickle"
    path.write_bytes(pickle.dumps((indices[0], SPEC)))
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
        env=dict(os.environ),
    )
    assert (done.returncode, done.stdout.strip()) == (0, "11"), done.stderr
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN  # and nothing changed here


class _Hanging(torch.utils.data.Dataset[int]):
    """Its second item does not come; as a decoder that loops, it hears no signal."""

    def __getitem__(self, request: int) -> int:
        if request:
            time.sleep(3600)
        return os.getpid()


def test_a_worker_that_hangs_in_a_video_ends_with_its_loader() -> None:
    items = ahead.load_ahead(_Hanging(), [0, 1], workers=1)
    worker = next(items)
    os.kill(worker, 0)  # lives
    items.close()
    deadline = time.monotonic() + 10
    while worker in {child.pid for child in multiprocessing.active_children()} and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
