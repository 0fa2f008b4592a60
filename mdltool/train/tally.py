"""An update's losses, counted over micro-batches and processes, and whether it may go on."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from mdltool.errors import Elsewhere, MdlError
from mdltool.train.distributed import World, gather_objects
from mdltool.train.objective import Part
from mdltool.types import Batch


@dataclass(frozen=True)
class Line:
    """Of one domain in one whole batch: the mean loss of its clips over all processes, and their number."""

    domain: str
    loss: float
    clips: int


@dataclass
class Tally:
    """Counts of one update. domains: in the recipe's order; batches: whole ones.

    skipped: domain (None: several) -> key -> why the clip was passed over; after `finish` the first process has
    what every process met.
    """

    domains: Sequence[str]
    batches: int
    waited: float = 0.0
    terms: dict[str, Tensor] = field(default_factory=dict)
    skipped: dict[str | None, dict[str, str]] = field(default_factory=dict)
    _losses: list[tuple[int, str, Tensor, int]] = field(default_factory=list)
    _keys: dict[tuple[int, str], list[str]] = field(default_factory=dict)

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; how long they keep their taker waiting is counted."""
        iterator = iter(batches)
        while True:
            started = time.monotonic()
            batch = next(iterator, None)
            self.waited += time.monotonic() - started
            if batch is None:
                return
            yield batch

    def add(self, batch: Batch, part: Part) -> None:
        """Count a micro-batch."""
        for domain, (loss, clips) in part.losses.items():
            self._losses.append((batch.number, domain, loss, clips))
        for key, domain in zip(batch.keys, domains_of(batch, self.domains), strict=True):
            self._keys.setdefault((batch.number, domain), []).append(key)
        self.terms |= part.parts
        if batch.skipped:
            self.skipped.setdefault(batch.domain, {}).update(batch.skipped)

    def finish(self, update: int, stop: bool, world: World) -> tuple[list[Line], bool]:
        """(what was counted, whether any process was asked to stop), the same on every process.

        Raises MdlError, on every process, where the loss of one is not finite; the clips are named where they are.
        """
        losses = torch.stack([loss.double() for _, _, loss, _ in self._losses]).tolist() if self._losses else []
        table = torch.zeros(self.batches, len(self.domains), 2, dtype=torch.float64)
        fault = None
        for (number, domain, _, clips), loss in zip(self._losses, losses, strict=True):
            table[number, self.domains.index(domain)] += torch.tensor([loss, clips], dtype=torch.float64)
            if not math.isfinite(loss) and fault is None:
                keys = self._keys.get((number, domain), [])
                fault = _fault(f"the loss of {domain} is {loss} at update {update + 1}", keys)
        for name, value in self.terms.items():
            if fault is None and not math.isfinite(float(value)):
                keys = [key for keys in self._keys.values() for key in keys]
                fault = _fault(f"the term '{name}' is {float(value)} at update {update + 1}", keys)
        raised = [float(stop), float(fault is not None), float(bool(self.skipped))]
        flags = torch.tensor(raised, dtype=torch.float64)
        if world.size > 1:
            message = torch.cat([flags, table.nan_to_num().flatten()])
            dist.all_reduce(message)
            flags, table = message[: len(raised)], message[len(raised) :].view_as(table)
        if fault is not None:
            raise fault
        if flags[1] > 0:
            raise Elsewhere("the loss is not finite in another process")
        if flags[2] > 0:
            self._gather_skipped(world)
        lines = [
            Line(self.domains[d], loss / clips, int(clips))
            for rows in table.tolist()
            for d, (loss, clips) in enumerate(rows)
            if clips
        ]
        return lines, bool(flags[0] > 0)

    def _gather_skipped(self, world: World) -> None:
        for theirs in (gather_objects(self.skipped, world) or [])[1:]:
            for domain, clips in theirs.items():
                self.skipped.setdefault(domain, {}).update(clips)


def _fault(what: str, keys: Sequence[str]) -> MdlError:
    fix = "lower the learning rate, or look at these clips; the last checkpoint is kept"
    return MdlError(what, f"clips {', '.join(keys)}", fix)


def domains_of(batch: Batch, domains: Sequence[str]) -> list[str]:
    """Each clip's domain."""
    if batch.domain is not None or batch.domain_B is None:
        assert batch.domain is not None
        return [batch.domain] * len(batch.keys)
    return [domains[number] for number in batch.domain_B.tolist()]


def update_counts(batches: Sequence[Batch]) -> Mapping[str, int]:
    """Domain -> clips of an update, over all processes, from its micro-batches."""
    counts: dict[str, int] = {}
    for whole in {batch.number: batch.whole for batch in batches}.values():
        for domain, clips in whole.items():
            counts[domain] = counts.get(domain, 0) + clips
    return counts
