"""mdltool shard: videos, images and annotations to tar shards."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mdltool.cli import options
from mdltool.errors import MdlError
from mdltool.types import DOMAIN_NAMES, names_domain

if TYPE_CHECKING:
    from mdltool.artifact import Artifact
    from mdltool.data.encode import Encoding
    from mdltool.data.modalities.asked import Asked
    from mdltool.stages.shard import Dataset, Writing

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
_ENCODINGS = ("copy", "h264", "jpeg")
_CHECKS = ("probe", "decode")
_EXAMPLES = (
    "Examples:  mdltool shard ~/videos/train --format folder --domain kitchen --split train   |   "
    "mdltool shard ~/UCF-101 --format ucf101 --annotations ~/ucfTrainTestlist --domain ucf101 --split train   |   "
    "mdltool shard ~/decathlon --format coco --annotations dtd_train.json --domain dtd --split train   |   "
    "mdltool shard ~/talks --format csv --annotations list.csv --domain talks --split train "
    "--modality audio --modality text --side text=~/subtitles   |   "
    "mdltool shard ~/MPIIGI --format mpiigi --domain mpiigi --split train --recipe cm3t_mpiigi "
    "--modality audio   |   "
    "mdltool shard --merge artifacts/shards/k400-train-part*"
)


def register(app: typer.Typer) -> None:
    app.command("shard", epilog=_EXAMPLES)(shard)


Source = Annotated[
    list[Path] | None, typer.Argument(help="Folder of the videos or images; with --merge: the parts (or piped).")
]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        help="folder, csv, multilabel, regression, coco, coco_multilabel, arrays, ucf101, hmdb51, kinetics, ssv2, "
        "mit, activitynet, epic_kitchens, epic_kitchens_actions, mpiigi or udiva.",
    ),
]
Domain = Annotated[str, typer.Option("--domain", help="The domain's name.")]
Split = Annotated[str, typer.Option("--split", help="train, val, test, ...")]
Annotations = Annotated[
    Path | None, typer.Option("--annotations", help="The CSV or JSON file, or the folder of the official lists.")
]
Fold = Annotated[int, typer.Option("--fold", min=1, help="Official split of UCF101 and HMDB51: 1, 2 or 3.")]
Classes = Annotated[Path | None, typer.Option("--classes", help="Class list, one a line: fixes the labels.")]
Encode = Annotated[str, typer.Option("--encode", help="copy (keep the bytes), h264 or jpeg.")]
ShortSide = Annotated[int, typer.Option("--short-side", min=16, help="h264, jpeg: most pixels of it.")]
Gop = Annotated[int, typer.Option("--gop", min=1, help="h264: frames from key frame to key frame.")]
ShardSize = Annotated[str, typer.Option("--shard-size", help="Bytes of source files in a shard.")]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Processes that check and encode (default: one per core).")
]
Part = Annotated[str, typer.Option("--part", help="Write the i-th of n shares, i from 0.", metavar="I/N")]
Merge = Annotated[bool, typer.Option("--merge", help="Join the parts given as arguments.")]
Exclude = Annotated[
    Path | None, typer.Option("--exclude", help="Leave out the clips of these keys, one a line (overlap --list).")
]
Verify = Annotated[str, typer.Option("--verify", help="probe: the first frame decodes; decode: all do.")]
MaxBad = Annotated[str, typer.Option("--max-bad", help="Fail when more clips than this are unusable.")]
Modality = Annotated[
    list[str] | None,
    typer.Option(
        "--modality",
        help="Store a stream beside the frames: audio, flow, text, audio_NAME, or NAME=KIND. Repeat it.",
        metavar="STREAM",
    ),
]
Plan = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="--modality names this recipe's streams for the domain, or a kind of them; they are made as it says.",
    ),
]
Side = Annotated[
    list[str] | None,
    typer.Option(
        "--side",
        help="Where a stream's files are, by the videos' names: sounds, flow frames, transcripts.",
        metavar="STREAM=PATH",
    ),
]
Features = Annotated[
    list[str] | None,
    typer.Option(
        "--features", help="Take a stream's tokens from files <key or video>.npy, [M, D].", metavar="STREAM=FOLDER"
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="An option of a stream, e.g. audio.store=opus. Repeat it.", metavar="STREAM.KEY=VALUE"
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List what would be written, and stop.")]


def shard(
    source: Source = None,
    format: Format = "",
    domain: Domain = "",
    split: Split = "",
    annotations: Annotations = None,
    fold: Fold = 1,
    classes: Classes = None,
    encode: Encode = "copy",
    short_side: ShortSide = 320,
    gop: Gop = 16,
    shard_size: ShardSize = "1GB",
    workers: Workers = None,
    part: Part = "",
    merge: Merge = False,
    exclude: Exclude = None,
    verify: Verify = "probe",
    max_bad: MaxBad = "1%",
    modality: Modality = None,
    recipe: Plan = None,
    side: Side = None,
    features: Features = None,
    set_: Set = None,
    dry_run: DryRun = False,
    work: options.Work = None,
    out: options.Out = None,
    as_json: options.Json = False,
) -> None:
    """Turn videos or images and annotations into tar shards.

    Clips that cannot be used are quarantined with the reason. Run it again to continue an interrupted run.
    """
    from mdltool import console
    from mdltool.artifact import work_dir
    from mdltool.stages import shard as stage

    place, allowed, count = work_dir(work), _fraction(max_bad), workers or len(os.sched_getaffinity(0))
    if merge:
        console.emit(_merge(source, out, place, allowed), as_json)
        return
    dataset = _dataset(source, format, domain, split, annotations, fold, classes)
    encoding, full, share = _encoding(encode, short_side, gop), _is_full(verify), _part(part)
    streams = _streams(recipe, domain, modality, side, features, set_)
    writing = stage.Writing(encoding, _bytes(shard_size), full, share, exclude, streams)
    if dry_run:
        _show_outlook(dataset, writing, as_json)
        return
    target = out or place / "shards" / stage.default_name(dataset, share)
    console.emit(stage.run(dataset, target, writing, stage.Effort(count, max_bad=allowed)), as_json)


def _dataset(
    source: list[Path] | None,
    format: str,
    domain: str,
    split: str,
    annotations: Path | None,
    fold: int,
    classes: Path | None,
) -> Dataset:
    """Of one source. Raises a fault of usage for what is not given, MdlError for names that paths cannot hold."""
    from mdltool.stages.shard import Dataset

    names = {"--format": format, "--domain": domain, "--split": split}
    absent = [name for name, value in names.items() if not value]
    if source is None or len(source) != 1 or absent:
        what = f"not given: {', '.join(absent)}" if absent else "give one SOURCE folder"
        raise typer.BadParameter(f"{what} (mdltool shard SOURCE --format F --domain D --split S)")
    if not names_domain(domain):
        raise MdlError(f"'{domain}' cannot be a domain's name", "--domain", DOMAIN_NAMES)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", split):
        raise MdlError(f"'{split}' cannot be a name", "--split", "use letters, digits, '_' and '-'")
    return Dataset(source[0], format, domain, split, annotations, fold, classes)


def _encoding(name: str, short_side: int, gop: int) -> Encoding:
    from mdltool.data.encode import Encoding

    _known("--encode", name, _ENCODINGS)
    return Encoding(name, short_side, gop)


def _is_full(check: str) -> bool:
    _known("--verify", check, _CHECKS)
    return check == "decode"


def _streams(recipe: str | None, domain: str, *words: list[str] | None) -> tuple[Asked, ...]:
    """words: those of --modality, --side, --features and --set."""
    from mdltool import console
    from mdltool.data.modalities.asked import asked

    given = [word or () for word in words]
    if recipe is None:
        return asked(*given)
    from mdltool.recipe import load
    from mdltool.stages.sources import asked_for

    found = load(recipe)
    streams = asked_for(found, domain, *given)
    whose = "" if domain in found.domains else f" (it has no domain '{domain}': of all of its streams)"
    console.say(f"streams of {found.name}: {', '.join(entry.name for entry in streams)}{whose}")
    return streams


def _merge(paths: list[Path] | None, out: Path | None, work: Path, max_bad: float) -> Artifact:
    from mdltool.artifact import open_artifact
    from mdltool.cli.inputs import piped_paths
    from mdltool.stages import shard as stage

    parts = paths or piped_paths()
    if not parts:
        raise MdlError("no parts are given", "--merge", "mdltool shard --merge PART PART ...")
    return stage.merge([open_artifact(path, "shards") for path in parts], out, work, max_bad)


def _show_outlook(dataset: Dataset, writing: Writing, as_json: bool) -> None:
    from mdltool import console
    from mdltool.stages import shard as stage

    found = stage.outlook(dataset, writing)
    if as_json:
        console.result_json(found)
        return
    console.say(f"{dataset.format}: {'; '.join(found['notes'])}")
    rows = [(s["file"], s["clips"], f"{s['source_bytes']:,}") for s in found["shards"]]
    console.table("nothing was written", ("shard", "clips", "bytes of source files"), rows, to_stdout=True)


def _known(option: str, value: str, names: tuple[str, ...]) -> None:
    from mdltool.registry import did_you_mean

    if value not in names:
        raise MdlError(f"'{value}' is not known", option, did_you_mean(value, names))


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or match[2] not in _UNITS or not float(match[1]):
        raise MdlError(f"'{text}' is no size", "--shard-size", "write e.g. 500MB, 1GB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def _fraction(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", text.strip())
    value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= value <= 1:
        raise MdlError(f"'{text}' is no share of the clips", "--max-bad", "write e.g. 1% or 0.01")
    return value


def _part(text: str) -> tuple[int, int] | None:
    """(i, n); None where nothing is given."""
    if not text:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None or int(match[1]) >= int(match[2]):
        raise MdlError(f"'{text}' is no part", "--part", "write i/n with i from 0 to n-1, e.g. 0/4")
    return int(match[1]), int(match[2])
