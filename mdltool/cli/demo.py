"""mdltool demo: every stage on generated videos, by the commands that a user would type."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdltool.cli import options
from mdltool.errors import MdlError

if TYPE_CHECKING:
    from mdltool.artifact import Artifact

DOMAINS = ("chalk", "neon", "field")
CLIPS_PER_CLASS = 24
FINETUNE = 30  # updates after the compression
SOUND, SOUND_CLIPS, SOUND_UPDATES = "sound", 16, 120  # the domain that gains a modality
VIEWS = "10x3"
SECOND_VIEWS = "3x1"  # of the compressed model: two times 10x3 would not fit into five minutes


def register(app: typer.Typer) -> None:
    app.command("demo", epilog="Example: mdltool demo --out demo --baselines")(demo)


def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory for the videos and artifacts.")] = Path("demo"),
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines", help="Also a multi-head model, a model per domain, and one that sees no order."
        ),
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the videos and of every training run.")] = 0,
    as_json: options.Json = False,
) -> None:
    """Generated domains through every stage, ending with a table and a report. No network, no GPU."""
    from mdltool import console
    from mdltool.artifact import open_artifact

    started = time.monotonic()
    run = _Runner(out, seed)
    run.prepare()
    models = {"adapters": run.model("tiny_demo")}
    evals = {"adapters": run.evaluate("tiny_demo")}
    models["compressed"] = run.compressed("tiny_demo")
    evals["compressed"] = run.evaluate(models["compressed"].name, views=SECOND_VIEWS)
    if baselines:
        for label, recipe in (("multi-head", "tiny_multihead"), ("per-frame", "tiny_perframe")):
            models[label] = run.model(recipe)
            evals[label] = run.evaluate(recipe)
        for domain in DOMAINS:
            models[f"separate: {domain}"] = run.model("tiny_single", domain)
            evals[f"separate: {domain}"] = run.evaluate("tiny_single", domain)
    heard = run.heard()
    report = run.report([*evals.values(), *heard.values()])
    found = _summary(
        {label: open_artifact(path) for label, path in models.items()},
        {label: open_artifact(path) for label, path in evals.items()},
    )
    found["sound"] = {label: _scores(open_artifact(path), SOUND) for label, path in heard.items()}
    found |= {"report": str(report / "report.html"), "seconds": round(time.monotonic() - started, 1)}
    _show(found)
    if as_json:
        console.result_json(found)
    else:
        console.result(found["report"])


class _Runner:
    """Types the commands: each is shown and then run in this process."""

    def __init__(self, out: Path, seed: int) -> None:
        self.out = out
        self.seed = seed
        self.work = out / "artifacts"

    def prepare(self) -> None:
        """Videos, shards and a pretrained backbone."""
        videos = self.out / "videos"
        clips = str(CLIPS_PER_CLASS)
        self._run(
            "synth", "--out", videos, "--domains", ",".join(DOMAINS), "--clips-per-class", clips, *self._seed()
        )
        for domain in DOMAINS:
            for split in ("train", "val"):
                place = ("--domain", domain, "--split", split, "--work", self.work)
                self._run("shard", videos / domain / split, "--format", "folder", *place)
        data = f"{DOMAINS[0]}={self.work / 'shards' / f'{DOMAINS[0]}-train'}"
        self._run("backbone", "pretrain", "--data", data, *self._train_seed(), "--work", self.work)

    def model(self, recipe: str, domain: str | None = None) -> Path:
        """Train a recipe, of one domain where the recipe stands for any; the model's path."""
        target = self.work / "model" / _name(recipe, domain)
        only = ("--domain", domain) if domain else ()
        self._run("train", "--recipe", recipe, *only, *self._train_seed(), "--work", self.work, "--out", target)
        return target

    def evaluate(self, recipe: str, domain: str | None = None, views: str = VIEWS) -> Path:
        """Evaluate that model; the eval's path."""
        name = _name(recipe, domain)
        target = self.work / "eval" / name
        model = self.work / "model" / name
        self._run("eval", model, "--views", views, "--work", self.work, "--out", target)
        return target

    def compressed(self, recipe: str) -> Path:
        """Compress that model to half its ranks and fine-tune it a little; the result's path."""
        source, target = self.work / "model" / recipe, self.work / "model" / f"{recipe}-r0.5"
        tune = ("--finetune", FINETUNE, "--set", "val.every=0", *self._train_seed())
        self._run("compress", source, "--rank", 0.5, *tune, "--work", self.work, "--out", target)
        return target

    def heard(self) -> dict[str, Path]:
        """A domain that is seen, and then heard too; the evals of both models."""
        videos = self.out / "videos-sound"
        clips = ("--clips-per-class", SOUND_CLIPS)
        self._run("synth", "--out", videos, "--domains", SOUND, *clips, *self._seed())
        for split in ("train", "val"):
            place = ("--domain", SOUND, "--split", split, "--modality", "audio", "--work", self.work)
            self._run("shard", videos / SOUND / split, "--format", "folder", *place)
        seen, heard = (self.work / "model" / name for name in ("tiny_sound", "tiny_sound+audio"))
        less = ("--set", f"train.steps.0.updates={SOUND_UPDATES}", "--set", "val.every=0", *self._train_seed())
        self._run("train", "--recipe", "tiny_sound", *less, "--work", self.work, "--out", seen)
        words = ("--modality", "audio", *less)
        self._run("add-modality", seen, *words, "--work", self.work, "--out", heard)
        evals = {"pictures": seen.name, "pictures and sound": heard.name}
        return {label: self.evaluate(name, views="1x1") for label, name in evals.items()}

    def report(self, evals: list[Path]) -> Path:
        """The report over all evals; its artifact's path."""
        target = self.work / "report" / "demo"
        self._run("report", *evals, "--work", self.work, "--out", target)
        return target

    def _seed(self) -> tuple[str, ...]:
        return ("--seed", str(self.seed))

    def _train_seed(self) -> tuple[str, ...]:
        return ("--set", f"train.seed={self.seed}") if self.seed else ()

    def _run(self, *words: object) -> None:
        import contextlib
        import io

        from mdltool import console
        from mdltool.cli.main import app

        command = [str(word) for word in words]
        console.say(f"$ mdltool {shlex.join(command)}")
        # each command prints its artifact's path; the demo's own stdout is the report's path alone
        with contextlib.redirect_stdout(io.StringIO()):
            code = app(command, standalone_mode=False)
        if code:
            raise MdlError(
                f"the command ended with {code}", f"mdltool {shlex.join(command)}", "see its message above"
            )


def _name(recipe: str, domain: str | None) -> str:
    return f"{recipe}-{domain}" if domain else recipe


def _scores(artifact: Artifact, domain: str) -> float:
    top1: float = artifact.load_json("metrics.json")["domains"][domain]["metrics"]["top1"]
    return top1


def _summary(models: dict[str, Artifact], evals: dict[str, Artifact]) -> dict[str, Any]:
    """Accuracy per domain, over appearance classes and over reversed pairs, and parameters."""
    from mdltool.data.synth import REVERSED

    rows = {}
    for label, artifact in evals.items():
        metrics = artifact.load_json("metrics.json")
        kinds: dict[str, list[tuple[float, int]]] = {"appearance": [], "reversed": []}
        for entry in metrics["domains"].values():
            for name, value in entry["per_class"].items():
                kind = "reversed" if name in REVERSED else "appearance"
                kinds[kind].append((value["accuracy"] * value["clips"], value["clips"]))
        rows[label] = {
            "views": metrics["views"],
            "top1": {domain: entry["metrics"]["top1"] for domain, entry in metrics["domains"].items()},
            **{kind: sum(v for v, _ in found) / sum(n for _, n in found) for kind, found in kinds.items()},
            "parameters": models[label].summary["parameters"]["total"],
        }
    return {"models": rows}


def _show(found: dict[str, Any]) -> None:
    from mdltool import console

    models = found["models"]
    rows: list[tuple[Any, ...]] = []
    for label, row in models.items():
        cells = [f"{100 * row['top1'][d]:.1f}" if d in row["top1"] else "" for d in DOMAINS]
        rows.append(
            (
                *(label, row["views"], *cells),
                *(f"{100 * row[kind]:.1f}" for kind in ("appearance", "reversed")),
                row["parameters"],
            )
        )
    separate = [row for label, row in models.items() if label.startswith("separate")]
    if separate:
        cells = [f"{100 * value:.1f}" for row in separate for value in row["top1"].values()]
        rows.append(("separate, together", VIEWS, *cells, "", "", sum(row["parameters"] for row in separate)))
    columns = ("model", "views", *DOMAINS, "appearance classes", "reversed pairs", "parameters")
    console.table("Top-1 in percent", columns, [(*r[:-1], f"{r[-1]:,}") for r in rows])
    heard = [(label, f"{100 * top1:.1f}") for label, top1 in found["sound"].items()]
    console.table(f"The domain '{SOUND}', top-1 in percent", ("model", SOUND), heard)
    console.say(f"{found['seconds']:.0f} s in all. The report:")
