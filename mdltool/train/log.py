"""metrics.jsonl, cut back on resume so that no update stands in it twice, and the trackers beside it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from accelerate import Accelerator

from mdltool import console
from mdltool.train.distributed import World
from mdltool.train.tally import Line, Tally
from mdltool.types import Batch

_TIME = "seconds"  # of training so far: in lines of validations alone


class MetricsLog:
    """metrics.jsonl of a run, by its first process, and clips-RANK.jsonl by every one where asked for.

    One JSON object a line. Dropped first: lines after `resume_at` updates, the validation at it, which comes after
    its checkpoint and so again, and a torn last line.
    """

    def __init__(self, folder: Path, resume_at: int, accelerator: Accelerator | None, world: World) -> None:
        self.accelerator = accelerator
        self._folder, self._resume_at, self._world = folder, resume_at, world
        self._metrics = _reopened(folder / "metrics.jsonl", resume_at) if world.is_main else None
        if world.is_main:  # a run may go on with fewer processes than it had
            for path in folder.glob("clips-*.jsonl"):
                if int(path.stem.removeprefix("clips-")) >= world.size:
                    _reopened(path, resume_at).close()
        self._clips: TextIO | None = None
        self._passed_over: set[tuple[str | None, str]] = set()

    def update(self, step: int, lines: Sequence[Line], tally: Tally, lr: float, seconds: float) -> None:
        """An update's losses by domain and whole batch, the objective's further terms, what was passed over."""
        for domain, passed_over in tally.skipped.items():
            self._write(step, domain, {"skipped": sorted(passed_over)})
            for key in sorted(passed_over):
                if (domain, key) not in self._passed_over:
                    console.warn(f"{key}{f' of {domain}' if domain else ''} is passed over: {passed_over[key]}")
                self._passed_over.add((domain, key))
        clips = sum(line.clips for line in lines)
        common = {
            "lr": lr,
            "clips_per_second": round(clips / seconds, 2),
            "data_wait": round(tally.waited / seconds, 4),
        }
        for line in lines:
            self._write(step, line.domain, {"loss": line.loss, **common})
        if tally.terms:
            self._write(step, None, {name: float(value) for name, value in tally.terms.items()})

    def clips(self, step: int, batch: Batch) -> None:
        """Which clips a micro-batch has."""
        if self._clips is None:
            self._clips = _reopened(self._folder / f"clips-{self._world.rank}.jsonl", self._resume_at)
        self._clips.write(json.dumps({"step": step, "domain": batch.domain, "keys": batch.keys}) + "\n")

    def validation(self, step: int, scores: Mapping[str, Mapping[str, float]], seconds: float) -> None:
        """Scores by domain; seconds: of training so far."""
        for domain, values in scores.items():
            named = {f"val_{key}": value for key, value in values.items()}
            self._write(step, domain, {**named, _TIME: round(seconds, 3)})

    def close(self) -> None:
        for handle in (self._metrics, self._clips):
            if handle is not None:
                handle.close()
        if self.accelerator is not None:
            # not end_training(), which leaves the process group as well: rank 0 still has to say that it is done
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def _write(self, step: int, domain: str | None, values: Mapping[str, Any]) -> None:
        if self._metrics is None:
            return
        head = {"step": step} | ({"domain": domain} if domain else {})
        self._metrics.write(json.dumps({**head, **values}) + "\n")
        if self.accelerator is not None:
            numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
            self.accelerator.log({f"{domain}/{k}" if domain else k: v for k, v in numbers.items()}, step=step)


def _reopened(path: Path, resume_at: int) -> TextIO:
    """A log that goes on after `resume_at` updates."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            if entry["step"] < resume_at + (_TIME not in entry):
                kept.append(line)
        except (ValueError, KeyError):
            continue
    path.write_text("".join(line + "\n" for line in kept))
    return open(path, "a", buffering=1)


def make_accelerator(precision: str, tracking: Path, world: World) -> Accelerator:
    """Accelerate's device, autocast and, in the first process, trackers: TensorBoard where it is installed."""
    from accelerate.state import AcceleratorState

    # The state is one per process and would refuse a second run with another precision.
    AcceleratorState._reset_state(reset_partial_state=False)
    have = importlib.util.find_spec("tensorboard") is not None and world.is_main
    if not have and world.is_main:
        console.say(
            "TensorBoard is not installed, so metrics.jsonl is the only log (pip install mdltool[tensorboard])"
        )
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        log_with="tensorboard" if have else None,
        project_dir=str(tracking) if have else None,
    )
    if have:
        accelerator.init_trackers("tensorboard")
    return accelerator
