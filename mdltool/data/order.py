"""Which clips make an update: pure functions of (seed, update), the same on every process.

A domain is an endless stream: one permutation of its clips after the other. An order says which positions of which
streams every whole batch takes; `Share` says which of them a process reads. So any number of processes, workers and
micro-batches gives the same batches, and a run that starts at update u gets what it would have got.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mdltool.errors import MdlError

DOMAIN_ORDERS = ("sequential", "shuffled", "random")
PROPORTIONS = ("proportional", "uniform", "temperature", "weighted")
# What a random number is for; with the seed, the domain and a position it decides the number.
ORDER, START, AUGMENT, DOMAINS, MIXED = range(5)


@dataclass(frozen=True)
class Slot:
    """One row of a batch: stream number, position in that stream, which augmented copy of it."""

    stream: int
    position: int
    copy: int = 0


@dataclass(frozen=True)
class Proportions:
    """How often each domain is drawn.

    mode: `proportional` to the clips, `uniform`, `temperature` (clips to the power 1 / temperature), or `weighted`
    (weights by domain, 1 where not given). replicas: how often a domain's clips count, by domain (spec multitrain
    5.1). Raises MdlError for another mode and for values that are not positive.
    """

    mode: str = "proportional"
    temperature: float = 2.0
    weights: Mapping[str, float] = field(default_factory=dict)
    replicas: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode not in PROPORTIONS:
            raise MdlError(f"proportions: '{self.mode}' is unknown", None, f"one of: {', '.join(PROPORTIONS)}")
        if not all(value > 0 for value in (self.temperature, *self.weights.values(), *self.replicas.values())):
            raise MdlError("proportions want numbers above 0", "data.proportions", "leave out what must not occur")

    def of(self, clips: Mapping[str, int]) -> np.ndarray:
        """Each domain's share of all draws, float64 [D], for domain -> clips."""
        sizes = np.array([n * self.replicas.get(name, 1) for name, n in clips.items()], dtype=np.float64)
        if self.mode == "uniform":
            sizes = np.ones_like(sizes)
        elif self.mode == "temperature":
            sizes = sizes ** (1 / self.temperature)
        elif self.mode == "weighted":
            sizes = np.array([self.weights.get(name, 1.0) for name in clips])
        return sizes / sizes.sum()


@dataclass(frozen=True)
class Share:
    """What process `rank` of `world` reads of each whole batch, in `parts` micro-batches.

    pairing: partners, which mixing blends, stay together: `mirrored` rows b and count - 1 - b of a batch, or
    `within`, mirrored among the rows of each stream. by: `rows` splits each batch, `batches` gives whole batches of
    an update to the processes in turn.
    """

    rank: int = 0
    world: int = 1
    parts: int = 1
    pairing: str | None = None
    by: str = "rows"

    def rows(self, batch: Sequence[Slot], part: int) -> tuple[list[int], list[int] | None]:
        """(rows of a whole batch that this process's micro-batch takes, for each of them its partner's place).

        Without pairing there are no partners.
        """
        cells, cell = self.parts, part
        if self.by == "rows":
            cells, cell = self.parts * self.world, part * self.world + self.rank
        if self.pairing is None:
            return _every(cells, cell, batch, range(len(batch))), None
        partner = _partners(batch, self.pairing)
        firsts = _every(cells, cell, batch, (row for row in range(len(batch)) if row <= partner[row]))
        rows = firsts + [partner[row] for row in firsts if partner[row] != row]
        place = {row: number for number, row in enumerate(rows)}
        return rows, [place[partner[row]] for row in rows]

    def takes(self, batch: int) -> bool:
        """Whether this process reads anything of an update's batch of that number."""
        return self.by == "rows" or batch % self.world == self.rank

    def batches(self, whole: int) -> int:
        """How many micro-batches of an update of `whole` batches this process reads."""
        return sum(self.takes(number) for number in range(whole)) * self.parts

    def check(self, draws: int, whole: int, where: str) -> None:
        """Raise MdlError where a process would get nothing: every one takes the same number of steps.

        draws: clips of a batch, each of which may be several rows.
        """
        cells = self.parts * (self.world if self.by == "rows" else 1)
        if (draws if self.pairing is None else (draws + 1) // 2) < cells:
            raise MdlError(
                f"a batch of {draws} clips of {where} cannot be shared by {self.world} processes"
                + (f" in {self.parts} parts" if self.parts > 1 else ""),
                where,
                "raise the batch or start fewer processes",
            )
        if self.by == "batches" and whole % self.world:
            raise MdlError(
                f"{whole} batches of an update cannot be shared by {self.world} processes",
                "train.split",
                "start as many processes as divide them, or: --set train.split=rows",
            )


class Order(ABC):
    """The whole batches of every update. batches: how many an update has. epoch: updates until the longest domain
    has been seen once (in turn), or as many clips as there are (mixed).
    """

    batches: int
    epoch: int
    draws_of: dict[str, int]  # clips drawn for a whole batch, by what it is of

    @abstractmethod
    def updates(self, start: int, stop: int) -> Iterator[list[list[Slot]]]:
        """For each update its batches, for each batch its rows."""


class InTurn(Order):
    """Batches of one domain each, R rounds of all domains an update (Omi et al., 3.4; spec omi_mdl 5.2).

    clips, batch: by domain; repeat: augmented copies of each clip, which make a batch's rows. order: `sequential`
    as given, `shuffled` anew for every round, `random` draws each domain with replacement, by proportions where
    given.
    """

    def __init__(
        self,
        clips: Mapping[str, int],
        batch: Mapping[str, int],
        seed: int,
        order: str = "sequential",
        rounds: int = 1,
        proportions: Proportions | None = None,
        repeat: int = 1,
    ) -> None:
        if order not in DOMAIN_ORDERS:
            raise MdlError(f"domain_order: '{order}' is unknown", None, f"one of: {', '.join(DOMAIN_ORDERS)}")
        self._batch = [batch[name] for name in clips]
        self._seed, self._order, self._rounds, self._repeat = seed, order, rounds, repeat
        self._shares = proportions.of(clips) if proportions is not None else None
        self.draws_of = {name: batch[name] for name in clips}
        self.batches = len(clips) * rounds
        self.epoch = max(-(-n // (batch[name] * rounds)) for name, n in clips.items())

    def updates(self, start: int, stop: int) -> Iterator[list[list[Slot]]]:
        taken = self._taken_before(start)
        for update in range(start, stop):
            batches = []
            for number in self._streams(update):
                first = taken[number] * self._batch[number]
                taken[number] += 1
                positions = range(first, first + self._batch[number])
                batches.append([Slot(number, p, c) for p in positions for c in range(self._repeat)])
            yield batches

    def _taken_before(self, update: int) -> list[int]:
        """Batches that each stream has given before an update."""
        if self._order != "random":
            return [update * self._rounds] * len(self._batch)
        drawn = [number for earlier in range(update) for number in self._streams(earlier)]
        return np.bincount(np.array(drawn, dtype=np.int64), minlength=len(self._batch)).tolist()

    def _streams(self, update: int) -> list[int]:
        """Stream numbers of an update's batches, round after round."""
        count = len(self._batch)
        if self._order == "sequential":
            return list(range(count)) * self._rounds
        rng = rng_for(self._seed, "", DOMAINS, update)
        if self._order == "shuffled":
            return [number for _ in range(self._rounds) for number in rng.permutation(count).tolist()]
        if self._shares is not None:
            return rng.choice(count, self.batches, p=self._shares).tolist()
        return rng.integers(0, count, self.batches).tolist()


class Mixed(Order):
    """One batch over all domains an update, from their shuffled union (Liang et al. 2022, 3.1; spec 5.1).

    An epoch has as many draws as there are clips, replicas counted, and each domain a fixed number of them by its
    proportion; which draw is of which domain is shuffled for every epoch. batch: draws, of which each becomes
    `repeat` rows.
    """

    def __init__(
        self,
        clips: Mapping[str, int],
        batch: int,
        seed: int,
        proportions: Proportions | None = None,
        repeat: int = 1,
    ) -> None:
        proportions = proportions or Proportions()
        self._seed, self._batch, self._repeat = seed, batch, repeat
        total = sum(n * proportions.replicas.get(name, 1) for name, n in clips.items())
        self.draws = _whole_numbers(proportions.of(clips) * total)
        self._total = int(self.draws.sum())
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.draws_of = {" and ".join(clips): batch}
        self.batches = 1
        self.epoch = -(-self._total // batch)

    def updates(self, start: int, stop: int) -> Iterator[list[list[Slot]]]:
        for update in range(start, stop):
            draws = (self._draw(n) for n in range(update * self._batch, (update + 1) * self._batch))
            yield [[Slot(stream, p, c) for stream, p in draws for c in range(self._repeat)]]

    def _draw(self, number: int) -> tuple[int, int]:
        """(stream, its position) of a draw, counted from the run's start."""
        epoch, offset = divmod(number, self._total)
        if epoch not in self._epochs:
            if len(self._epochs) == 2:  # a batch may span two epochs
                self._epochs.clear()
            self._epochs[epoch] = self._epoch(epoch)
        streams, occurrences = self._epochs[epoch]
        stream = int(streams[offset])
        return stream, epoch * int(self.draws[stream]) + int(occurrences[offset])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each draw: its stream, and how many draws of that stream come before it in the epoch."""
        order = rng_for(self._seed, "", MIXED, epoch).permutation(self._total)
        streams = np.repeat(np.arange(len(self.draws)), self.draws)[order]
        occurrences = np.empty(self._total, dtype=np.int64)
        for stream, draws in enumerate(self.draws):
            occurrences[streams == stream] = np.arange(draws)
        return streams, occurrences


def _every(cells: int, cell: int, batch: Sequence[Slot], rows: Iterable[int]) -> list[int]:
    """Every cells-th clip's rows, from number `cell` on: copies of a clip stay together, for it is decoded once."""
    clips: list[list[int]] = []
    for row in rows:
        if batch[row].copy == 0 or not clips:
            clips.append([])
        clips[-1].append(row)
    return [row for chosen in clips[cell::cells] for row in chosen]


def _partners(batch: Sequence[Slot], pairing: str) -> list[int]:
    """Each row's partner (spec multitrain 5.3)."""
    if pairing == "mirrored":
        return list(range(len(batch)))[::-1]
    partner = [0] * len(batch)
    for stream in {slot.stream for slot in batch}:
        own = [row for row, slot in enumerate(batch) if slot.stream == stream]
        for row, other in zip(own, reversed(own), strict=True):
            partner[row] = other
    return partner


def rows_of(batch: Sequence[Slot], names: Sequence[str]) -> dict[str, int]:
    """Domain -> its rows in a batch, of the domains that it has any of."""
    counts = np.bincount([slot.stream for slot in batch], minlength=len(names))
    return {name: int(n) for name, n in zip(names, counts, strict=True) if n}


def rng_for(seed: int, domain: str, purpose: int, *position: int) -> np.random.Generator:
    """The generator of one decision."""
    return np.random.default_rng([seed, zlib.crc32(domain.encode()), purpose, *position])


def _whole_numbers(shares: np.ndarray) -> np.ndarray:
    """Whole numbers nearest to shares, with their sum: the largest remainders are rounded up."""
    whole = np.floor(shares + 1e-9).astype(np.int64)
    missing = round(float(shares.sum())) - int(whole.sum())
    whole[np.argsort(whole - shares, kind="stable")[:missing]] += 1
    return whole
