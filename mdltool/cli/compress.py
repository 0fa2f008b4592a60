"""mdltool compress."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdltool.cli import options
from mdltool.errors import MdlError

if TYPE_CHECKING:
    from mdltool.artifact import Artifact
    from mdltool.stages.compression import Amount, Finetune

_MODES = ("per_domain", "stacked")
_SCOPES = ("joint", "worst")

Rank = Annotated[
    str | None, typer.Option("--rank", help="Components of every weight: a number, or a fraction such as 0.5.")
]
Energy = Annotated[
    float | None, typer.Option("--energy", help="The fewest components that keep this part of the norm.")
]
Budget = Annotated[
    str | None, typer.Option("--budget", help="The best within so many numbers: 300k, 1.2M, or 0.5x of dense.")
]
RankMode = Annotated[
    str, typer.Option("--rank-mode", help="What a fraction is of: per_domain (one matrix) or stacked.")
]
EnergyScope = Annotated[str, typer.Option("--energy-scope", help="Whose norm: joint, or worst (of every domain).")]
MinRank = Annotated[int, typer.Option("--min-rank", min=0, help="With --budget; 0 may drop an adapter.")]
Independent = Annotated[bool, typer.Option("--independent", help="Each domain by itself: nothing is shared.")]
Whitened = Annotated[
    bool, typer.Option("--whiten", help="Least error of outputs on training clips, instead of weights.")
]
Batches = Annotated[int | None, typer.Option("--batches", min=1, help="With --whiten: of each domain (default 8).")]
Swept = Annotated[
    bool, typer.Option("--sweep", help="Score several ranks first: a table, sweep.csv and sweep.png.")
]
SweepRanks = Annotated[
    str | None, typer.Option("--sweep-ranks", help="Which (default: 0.0625,0.125,0.25,0.375,0.5,0.625).")
]
Extend = Annotated[
    str | None,
    typer.Option("--extend", help="Add this model's new domain to a compressed model.", metavar="MODEL[:D]"),
]
Grow = Annotated[int, typer.Option("--grow", min=0, help="With --extend: so many more components of every weight.")]
Updates = Annotated[
    int | None, typer.Option("--finetune", min=1, help="Then train what is a domain's own for so many updates.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="svd.KEY=VALUE, or with --finetune a key of the recipe's training; repeat it.",
        metavar="KEY=VALUE",
    ),
]


@dataclass(frozen=True)
class _Kept:
    """How much is to be kept, in the words of the command line."""

    rank: str | None
    energy: float | None
    budget: str | None
    rank_mode: str
    energy_scope: str
    min_rank: int
    independent: bool

    def check(self, sweeps: bool, extends: bool) -> None:
        """Raise MdlError unless it is said in one way, and for an option of an amount that is not given."""
        for value, known, option in (
            (self.rank_mode, _MODES, "--rank-mode"),
            (self.energy_scope, _SCOPES, "--energy-scope"),
        ):
            if value not in known:
                raise MdlError(f"'{value}' is not known", option, f"one of: {', '.join(known)}")
        amounts = sum(value is not None for value in (self.rank, self.energy, self.budget))
        if extends:
            _refuse_settled(bool(amounts) or sweeps or self.independent, "--extend")
        if not extends and (amounts > 1 or (amounts == 0 and not sweeps)):
            fix = "e.g. --rank 0.5, or --sweep alone"
            raise MdlError("say how much is to be kept, in one way", "--rank, --energy, --budget", fix)
        if self.rank is not None:
            _rank(self.rank)
        fraction = sweeps or (self.rank is not None and not self.rank.isdigit())
        _refuse_idle(self.rank_mode != "per_domain" and not fraction, "--rank-mode", "--rank FRACTION")
        _refuse_idle(self.energy_scope != "joint" and self.energy is None, "--energy-scope", "--energy")
        _refuse_idle(self.min_rank != 1 and self.budget is None, "--min-rank", "--budget")

    def amount(self) -> Amount:
        from mdltool.stages.compression import Amount

        rank = _rank(self.rank) if self.rank is not None else None
        scoped = (self.rank_mode, self.energy_scope, self.min_rank, self.independent)
        return Amount(rank, self.energy, self.budget, *scoped)  # type: ignore[arg-type]

    def label(self, whiten: bool, finetune: int | None) -> str:
        """What an artifact's name says of the request: r0.5, e0.9-independent, b0.5x-whiten-ft200."""
        energy = None if self.energy is None else f"{self.energy:g}"
        named = (("r", self.rank), ("e", energy), ("b", self.budget))
        amount = next((letter + value for letter, value in named if value is not None), "swept")
        said = (("-independent", self.independent), ("-whiten", whiten), (f"-ft{finetune}", finetune))
        return amount + "".join(words for words, given in said if given)


def register(app: typer.Typer) -> None:
    example = "Example: mdltool train --recipe omi_x3dm_all | mdltool compress --rank 0.5 | mdltool eval"
    app.command("compress", epilog=example)(compress)


def compress(
    model: options.Model = None,
    rank: Rank = None,
    energy: Energy = None,
    budget: Budget = None,
    rank_mode: RankMode = "per_domain",
    energy_scope: EnergyScope = "joint",
    min_rank: MinRank = 1,
    independent: Independent = False,
    whiten: Whitened = False,
    batches: Batches = None,
    sweep: Swept = False,
    sweep_ranks: SweepRanks = None,
    extend: Extend = None,
    grow: Grow = 0,
    finetune: Updates = None,
    overrides: Set = None,
    data: options.Data = None,
    resume: options.Resume = False,
    workers: options.Workers = None,
    work: options.Work = None,
    out: options.Out = None,
    as_json: options.Json = False,
) -> None:
    """Factor a model's adapters so that its domains share a part of each: fewer numbers, nearly the same outputs.

    --finetune runs the last step of the model's own recipe with what domains share frozen; --set changes it.
    """
    kept = _Kept(rank, energy, budget, rank_mode, energy_scope, min_rank, independent)
    sweeps = sweep or sweep_ranks is not None
    kept.check(sweeps, extend is not None)
    _refuse_idle(bool(grow) and extend is None, "--grow", "--extend MODEL")
    _refuse_idle(batches is not None and not whiten, "--batches", "--whiten")

    from mdltool import console
    from mdltool.artifact import work_dir
    from mdltool.cli.inputs import resolve, workers_or_default

    place, count = work_dir(work), workers_or_default(workers)
    source = resolve(model, "model", place)
    training = _Training(data, tuple(overrides or ()), finetune, resume, count, place)
    if extend is not None:
        _refuse_settled(whiten, "--whiten")
        console.emit(_extended(source, extend, grow, training, out), as_json)
        return
    ranks = _sweep_ranks(sweep_ranks) if sweeps else None
    artifact = _compressed(source, kept, training, ranks, batches or 8 if whiten else None, out)
    if int(os.environ.get("RANK", "0")) == 0:
        show(artifact)
    console.emit(artifact, as_json)


@dataclass(frozen=True)
class _Training:
    """What --finetune, a sweep and whitening need."""

    data: list[str] | None
    overrides: tuple[str, ...]
    updates: int | None
    resume: bool
    workers: int
    work: Path

    def shards(self, domains: list[str], splits: tuple[str, ...]) -> list[Artifact]:
        from mdltool.cli.inputs import shards_for

        return shards_for(self.data, self.work, domains, splits) if splits else []

    def finetune(self, shards: list[Artifact], rest: list[str]) -> Finetune | None:
        """rest: overrides of the recipe's training."""
        from mdltool.stages.compression import Finetune

        if self.updates is None:
            return None
        return Finetune(self.updates, shards, rest, self.resume, self.workers)

    def check(self, rest: list[str], train_shared: bool, data_is_read: bool) -> None:
        """Raise MdlError for what only a training would use, where there is none."""
        given = f"--set {rest[0]}" if rest else "--set svd.train_shared" if train_shared else "--data"
        idle = bool(rest) or train_shared or (bool(self.data) and not data_is_read)
        if self.updates is None and idle:
            raise MdlError("nothing is trained", given, "add --finetune UPDATES")


def _compressed(
    source: Artifact,
    kept: _Kept,
    training: _Training,
    sweep: tuple[float, ...] | None,
    whiten: int | None,
    out: Path | None,
) -> Artifact:
    """sweep: ranks to score first. whiten: batches of each domain."""
    from mdltool.stages import compress as stage
    from mdltool.stages.compression import parse_svd
    from mdltool.stages.sweeping import Sweep
    from mdltool.stages.whitening import Whiten

    svd, rest = parse_svd(training.overrides)
    training.check(rest, svd.train_shared, sweep is not None or whiten is not None)
    tunes = training.updates is not None
    splits = ("train",) * (tunes or whiten is not None) + ("val",) * (tunes or sweep is not None)
    shards = training.shards(list(source.load_json("model.json")["domains"]), splits)
    calibration = [part for part in shards if part.summary.get("split") == "train"]
    label = kept.label(whiten is not None, training.updates)
    return stage.run(
        source,
        kept.amount(),
        out or training.work / "model" / f"{source.path.resolve().name}-{label}",
        work=training.work,
        svd=svd,
        finetune=training.finetune(shards, rest),
        sweep=Sweep(shards, sweep, training.workers) if sweep is not None else None,
        whiten=Whiten(calibration, whiten, training.workers) if whiten is not None else None,
    )


def _sweep_ranks(text: str | None) -> tuple[float, ...]:
    from mdltool.stages.sweeping import RANKS, parse_ranks

    return RANKS if text is None else parse_ranks(text)


def _extended(source: Artifact, text: str, grow: int, training: _Training, out: Path | None) -> Artifact:
    """text: MODEL or MODEL:DOMAIN, whose domain is added."""
    from mdltool.stages import extend as stage
    from mdltool.stages.compression import Svd, parse_svd

    svd, rest = parse_svd(training.overrides)
    training.check(rest, svd.train_shared, False)
    _refuse_settled(svd != Svd(), "--set svd", "its decomposition")
    other, domain = _other(text)
    added = domain or _new(other, list(source.load_json("model.json")["domains"]))
    shards = training.shards([added], ("train", "val") if training.updates is not None else ())
    name = f"{source.path.resolve().name}+{added}{f'-g{grow}' if grow else ''}"
    return stage.run(
        source,
        other,
        domain,
        out or training.work / "model" / name,
        work=training.work,
        grow=grow,
        finetune=training.finetune(shards, rest),
    )


def _refuse_settled(given: bool, option: str, what: str = "the ranks") -> None:
    """Raise MdlError for an option of what a compressed model has settled."""
    if given:
        raise MdlError(f"the compressed model settles {what}", option, "leave out all but --grow and --finetune")


def _refuse_idle(idle: bool, option: str, of: str) -> None:
    """Raise MdlError for an option that says something of another one that is not given."""
    if idle:
        raise MdlError(f"this option does nothing without {of}", option, f"add {of}, or leave it out")


def _rank(text: str) -> float:
    """A whole number or a fraction."""
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        fix = "a whole number from 1, or a fraction between 0 and 1"
        raise MdlError(f"'{text}' is no rank", "--rank", fix) from None


def _other(text: str) -> tuple[Artifact, str | None]:
    """MODEL or MODEL:DOMAIN."""
    from mdltool.artifact import open_artifact

    path, colon, domain = text.rpartition(":")
    if colon and not Path(text).exists():
        return open_artifact(Path(path), "model"), domain
    return open_artifact(Path(text), "model"), None


def _new(other: Artifact, domains: list[str]) -> str:
    """The only domain of another model that is not among these."""
    added = [name for name in other.load_json("model.json")["domains"] if name not in domains]
    if len(added) != 1:
        raise MdlError(f"{len(added)} of its domains are new", other.path, "--extend MODEL:DOMAIN")
    return added[0]


def show(artifact: Artifact, to_stdout: bool = False) -> None:
    """The table of a compressed model's weights, on stderr unless it is the command's result."""
    from mdltool import console

    rows: list[tuple[Any, ...]] = []
    for row in artifact.load_json("compression.json")["weights"]:
        rank = "" if row["rank"] is None else row["rank"]
        cells = (row["form"], rank, row["full"], f"{100 * row['retained']:.1f}")
        rows.append((row["site"], row["parameter"], *cells, f"{row['stored']:,}", f"{row['dense']:,}"))
    found = artifact.summary["compressed"]
    whole = (f"{100 * found['retained']:.1f}", f"{found['stored']:,}", f"{found['dense']:,}")
    rows.append(("all", "", "", "", "", *whole))
    columns = ("site", "weight", "form", "rank", "of", "energy %", "stored", "dense")
    console.table(
        f"{found['stored']:,} of {found['dense']:,} numbers ({found['ratio']:.3f})", columns, rows, to_stdout
    )
