"""mdltool compress."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdltool.cli import options
from mdltool.cli.train import Resume
from mdltool.errors import MdlError

if TYPE_CHECKING:
    from mdltool.artifact import Artifact


def register(app: typer.Typer) -> None:
    example = "Example: mdltool train --recipe omi_x3dm_all | mdltool compress --rank 0.5 | mdltool eval"
    app.command("compress", epilog=example)(compress)


def compress(
    model: Annotated[
        Path | None, typer.Argument(help="A model artifact (default: piped, or the latest).", metavar="[MODEL]")
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option("--rank", help="Components of every weight: a number, or a fraction such as 0.5."),
    ] = None,
    energy: Annotated[
        float | None, typer.Option("--energy", help="The fewest components that keep this part of the norm.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="The best within so many numbers: 300k, 1.2M, or 0.5x of dense.")
    ] = None,
    rank_mode: Annotated[
        str, typer.Option("--rank-mode", help="What a fraction is of: per_domain (one matrix) or stacked.")
    ] = "per_domain",
    energy_scope: Annotated[
        str, typer.Option("--energy-scope", help="Whose norm: joint, or worst (of every domain).")
    ] = "joint",
    min_rank: Annotated[int, typer.Option("--min-rank", min=0, help="With --budget; 0 may drop an adapter.")] = 1,
    independent: Annotated[
        bool, typer.Option("--independent", help="Each domain by itself: nothing is shared.")
    ] = False,
    whiten: Annotated[
        bool, typer.Option("--whiten", help="Least error of outputs on training clips, instead of weights.")
    ] = False,
    batches: Annotated[
        int | None, typer.Option("--batches", min=1, help="With --whiten: of each domain (default 8).")
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Score several ranks first: a table, sweep.csv and sweep.png.")
    ] = False,
    sweep_ranks: Annotated[
        str | None, typer.Option("--sweep-ranks", help="Which (default: 0.0625,0.125,0.25,0.375,0.5,0.625).")
    ] = None,
    extend: Annotated[
        str | None,
        typer.Option("--extend", help="Add this model's new domain to a compressed model.", metavar="MODEL[:D]"),
    ] = None,
    grow: Annotated[
        int, typer.Option("--grow", min=0, help="With --extend: so many more components of every weight.")
    ] = 0,
    finetune: Annotated[
        int | None,
        typer.Option("--finetune", min=1, help="Then train what is a domain's own for so many updates."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="svd.KEY=VALUE, or with --finetune a key of the recipe's training; repeat it.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    data: options.Data = None,
    resume: Resume = False,
    workers: options.Workers = None,
    work: options.Work = None,
    out: options.Out = None,
    as_json: options.Json = False,
) -> None:
    """Factor a model's adapters so that its domains share a part of each: fewer numbers, nearly the same outputs.

    --finetune runs the last step of the model's own recipe with what domains share frozen; --set changes it.
    """
    import os

    from mdltool import console
    from mdltool.artifact import work_dir
    from mdltool.cli.inputs import default_workers, resolve, shards_for

    for value, known, option in ((rank_mode, _MODES, "--rank-mode"), (energy_scope, _SCOPES, "--energy-scope")):
        if value not in known:
            raise MdlError(f"'{value}' is not known", option, f"one of: {', '.join(known)}")
    amounts = sum(value is not None for value in (rank, energy, budget))
    sweeps = sweep or sweep_ranks is not None
    if extend is not None and (amounts or sweeps or independent or whiten):
        raise MdlError(
            "the compressed model settles the ranks", "--extend", "leave out all but --grow and --finetune"
        )
    if grow and extend is None:
        raise MdlError("nothing is added to a compressed model", "--grow", "--extend MODEL")
    if extend is None and (amounts > 1 or (amounts == 0 and not sweeps)):
        fix = "e.g. --rank 0.5, or --sweep alone"
        raise MdlError("say how much is to be kept, in one way", "--rank, --energy, --budget", fix)
    if batches is not None and not whiten:
        raise MdlError("this option does nothing without --whiten", "--batches", "add --whiten, or leave it out")
    _refuse_idle(rank, energy, budget, rank_mode, energy_scope, min_rank, sweeps)
    place = work_dir(work)
    parsed = _rank(rank) if rank is not None else None
    source = resolve(model, "model", place)

    from mdltool.stages import compress as stage
    from mdltool.stages.compression import Amount, Finetune, Svd, parse_svd
    from mdltool.stages.sweeping import RANKS, Sweep, parse_ranks
    from mdltool.stages.whitening import Whiten

    svd, rest = parse_svd(overrides or ())
    if finetune is None and (rest or svd.train_shared or (data and not sweeps and not whiten)):
        given = f"--set {rest[0]}" if rest else "--set svd.train_shared" if svd.train_shared else "--data"
        raise MdlError("nothing is trained", given, "add --finetune UPDATES")
    if extend is not None and svd != Svd():
        raise MdlError("the compressed model settles its decomposition", "--set svd", "leave it out")
    count = default_workers() if workers is None else workers
    domains = list(source.load_json("model.json")["domains"])
    name = source.path.resolve().name
    if extend is not None:
        other, domain = _other(extend)
        shards = shards_for(data, place, [domain or _new(other, domains)], ("train", "val")) if finetune else []
        training = Finetune(finetune, shards, rest, resume, count) if finetune is not None else None
        from mdltool.stages import extend as extending

        target = out or place / "model" / f"{name}+{domain or _new(other, domains)}{f'-g{grow}' if grow else ''}"
        added = extending.run(source, other, domain, target, work=place, grow=grow, finetune=training)
        console.emit(added, as_json)
        return
    ranks = parse_ranks(sweep_ranks) if sweep_ranks is not None else RANKS
    splits = (("train",) if finetune or whiten else ()) + (("val",) if finetune or sweeps else ())
    shards = shards_for(data, place, domains, splits) if splits else []
    training = Finetune(finetune, shards, rest, resume, count) if finetune is not None else None
    amount = Amount(parsed, energy, budget, rank_mode, energy_scope, min_rank, independent)  # type: ignore[arg-type]
    label = _label(rank, energy, budget, independent, whiten, finetune)
    calibration = [s for s in shards if s.summary.get("split") == "train"] if whiten else []
    swept = Sweep(shards, ranks, count) if sweeps else None
    artifact = stage.run(
        source,
        amount,
        out or place / "model" / f"{name}-{label}",
        work=place,
        svd=svd,
        finetune=training,
        sweep=swept,
        whiten=Whiten(calibration, batches or 8, count) if whiten else None,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        show(artifact)
    console.emit(artifact, as_json)


def _refuse_idle(
    rank: str | None,
    energy: float | None,
    budget: str | None,
    rank_mode: str,
    energy_scope: str,
    min_rank: int,
    sweeps: bool,
) -> None:
    """Raise MdlError for an option that says something of an amount that is not given."""
    fraction = sweeps or (rank is not None and not rank.isdigit())
    for idle, option, of in (
        (rank_mode != "per_domain" and not fraction, "--rank-mode", "--rank FRACTION"),
        (energy_scope != "joint" and energy is None, "--energy-scope", "--energy"),
        (min_rank != 1 and budget is None, "--min-rank", "--budget"),
    ):
        if idle:
            raise MdlError(f"this option does nothing without {of}", option, f"add {of}, or leave it out")


_MODES = ("per_domain", "stacked")
_SCOPES = ("joint", "worst")


def _rank(text: str) -> float:
    """A whole number or a fraction."""
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        fix = "a whole number from 1, or a fraction between 0 and 1"
        raise MdlError(f"'{text}' is no rank", "--rank", fix) from None


def _label(
    rank: str | None,
    energy: float | None,
    budget: str | None,
    independent: bool,
    whiten: bool,
    finetune: int | None,
) -> str:
    """What an artifact's name says of the request: r0.5, e0.9-independent, b0.5x-whiten-ft200."""
    named = (("r", rank), ("e", None if energy is None else f"{energy:g}"), ("b", budget))
    amount = next((letter + value for letter, value in named if value is not None), "swept")
    said = (("-independent", independent), ("-whiten", whiten), (f"-ft{finetune}", finetune))
    return amount + "".join(words for words, given in said if given)


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
