"""Which clips make an update: counts, epochs, shares and starting anywhere."""

from __future__ import annotations

import collections
import itertools
from typing import Any

import numpy as np
import pytest

from mdltool.data.order import InTurn, Mixed, Proportions, Share, Slot, rows_of
from mdltool.errors import MdlError

CLIPS = {"big": 97, "mid": 20, "tiny": 3}


def draws(order: Mixed, updates: int, start: int = 0) -> list[Slot]:
    return [slot for batches in order.updates(start, updates) for batch in batches for slot in batch]


class TestMixed:
    def test_an_epoch_is_every_clip_once(self) -> None:
        order = Mixed(CLIPS, 8, seed=0)
        assert order.epoch == 15
        seen = draws(order, 30)
        for epoch in range(2):
            part = seen[120 * epoch : 120 * (epoch + 1)]
            expected = {(k, n * epoch + i) for k, n in enumerate(CLIPS.values()) for i in range(n)}
            assert {(slot.stream, slot.position) for slot in part} == expected
        assert [s.stream for s in seen[:120]] != [s.stream for s in seen[120:]], "each epoch is shuffled anew"

    def test_batches_mix_in_proportion(self) -> None:
        """Hypergeometric: a batch of 12 of the 120 has 9.7 clips of the big domain, deviation 1.3."""
        counts = [
            rows_of(batch, list(CLIPS)).get("big", 0) for (batch,) in Mixed(CLIPS, 12, seed=1).updates(0, 500)
        ]
        assert np.mean(counts) == pytest.approx(9.7, abs=0.05), "exact over whole epochs"
        assert np.std(counts) == pytest.approx(np.sqrt(12 * 97 / 120 * 23 / 120 * 108 / 119), rel=0.15)

    @pytest.mark.parametrize(
        ("proportions", "expected"),
        [
            (Proportions(), [97, 20, 3]),
            (Proportions("uniform"), [40, 40, 40]),
            (Proportions("temperature", temperature=1.0), [97, 20, 3]),
            (Proportions("weighted", weights={"big": 2.0, "mid": 1.0, "tiny": 1.0}), [60, 30, 30]),
            (Proportions(replicas={"tiny": 10}), [97, 20, 30]),
        ],
    )
    def test_draws_of_an_epoch(self, proportions: Proportions, expected: list[int]) -> None:
        order = Mixed(CLIPS, 7, seed=0, proportions=proportions)
        assert order.draws.tolist() == expected
        total = sum(expected)
        counted = collections.Counter(slot.stream for slot in draws(order, total))  # total x 7 draws: 7 epochs
        assert [counted[k] for k in range(3)] == [7 * n for n in expected]
        positions = [slot.position for slot in draws(order, total) if slot.stream == 2]
        assert positions == list(range(len(positions))), "a domain's stream is taken without gaps"

    def test_temperature_is_a_power(self) -> None:
        sizes = np.array(list(CLIPS.values()), dtype=float) ** 0.5
        np.testing.assert_allclose(Proportions("temperature", temperature=2.0).of(CLIPS), sizes / sizes.sum())

    def test_starting_anywhere(self) -> None:
        order = Mixed(CLIPS, 9, seed=5)
        whole = draws(order, 40)
        for start in range(0, 40, 7):
            assert draws(Mixed(CLIPS, 9, seed=5), 40, start) == whole[9 * start :]

    def test_repeats_are_rows_of_their_own(self) -> None:
        (batch,) = next(Mixed(CLIPS, 4, seed=0, repeat=2).updates(0, 1))
        assert [slot.copy for slot in batch] == [0, 1] * 4
        assert batch[0].position == batch[1].position


class TestInTurn:
    def test_random_domains_by_proportion(self) -> None:
        order = InTurn(CLIPS, dict.fromkeys(CLIPS, 2), 0, "random", proportions=Proportions())
        numbers = [batch[0].stream for batches in order.updates(0, 2000) for batch in batches]
        shares = np.bincount(numbers) / len(numbers)
        np.testing.assert_allclose(shares, [97 / 120, 20 / 120, 3 / 120], atol=0.02)

    def test_epoch(self) -> None:
        assert InTurn(CLIPS, {"big": 10, "mid": 1, "tiny": 3}, 0).epoch == 20
        assert InTurn(CLIPS, {"big": 10, "mid": 1, "tiny": 3}, 0, rounds=2).epoch == 10


class TestShare:
    @pytest.mark.parametrize("pairing", [None, "mirrored", "within"])
    @pytest.mark.parametrize(("world", "parts", "count"), [(1, 1, 7), (2, 1, 8), (3, 1, 7), (2, 2, 9), (1, 4, 8)])
    def test_every_row_once(self, world: int, parts: int, count: int, pairing: str | None) -> None:
        batch = [Slot(row % 3 % 2, row) for row in range(count)]
        taken = [
            Share(rank, world, parts, pairing).rows(batch, part)
            for rank, part in itertools.product(range(world), range(parts))
        ]
        assert sorted(row for rows, _ in taken for row in rows) == list(range(count))
        assert all(rows for rows, _ in taken), "nobody is without work"
        for rows, partners in taken:
            if partners is None:
                assert pairing is None
                continue
            pairs = {(row, rows[partner]) for row, partner in zip(rows, partners, strict=True)}
            assert pairs == {(b, a) for a, b in pairs}, "partners are each other's"
            if pairing == "mirrored":
                assert all(a + b == count - 1 for a, b in pairs)
            else:
                assert all(batch[a].stream == batch[b].stream for a, b in pairs)

    @pytest.mark.parametrize("pairing", [None, "mirrored"])
    def test_copies_of_a_clip_stay_together(self, pairing: str | None) -> None:
        (batch,) = next(Mixed(CLIPS, 10, seed=0, repeat=2).updates(0, 1))
        for rank in range(3):
            rows, _ = Share(rank, 3, pairing=pairing).rows(batch, 0)
            clips = collections.Counter((batch[row].stream, batch[row].position) for row in rows)
            assert set(clips.values()) == {2}

    def test_whole_batches(self) -> None:
        shares = [Share(rank, 2, by="batches") for rank in range(2)]
        assert [[s.takes(n) for n in range(4)] for s in shares] == [[True, False] * 2, [False, True] * 2]
        assert [s.batches(4) for s in shares] == [2, 2]
        assert shares[1].rows([Slot(0, p) for p in range(3)], 0) == ([0, 1, 2], None)

    @pytest.mark.parametrize(
        ("share", "rows", "message"),
        [
            (Share(0, 8), 4, "a batch of 4 clips of x cannot be shared by 8 processes"),
            (Share(0, 3, pairing="mirrored"), 4, "cannot be shared by 3"),
            (Share(0, 2, parts=3), 5, "2 processes in 3 parts"),
            (Share(0, 2, by="batches"), 4, "3 batches of an update cannot be shared by 2"),
        ],
    )
    def test_impossible(self, share: Share, rows: int, message: str) -> None:
        with pytest.raises(MdlError, match=message):
            share.check(rows, 3, "x")


@pytest.mark.parametrize("options", [{"mode": "sizes"}, {"temperature": 0.0}, {"replicas": {"a": 0}}])
def test_bad_proportions(options: dict[str, Any]) -> None:
    with pytest.raises(MdlError):
        Proportions(**options)
