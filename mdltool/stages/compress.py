"""`compress`: a model whose domains' adapters share factors -> model (spec residual_adapters 2.5).

`compression.json` of the artifact says of every weight what became of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mdltool import console
from mdltool.artifact import Artifact, Draft, Input, partial_path
from mdltool.compress import ranks
from mdltool.compress.factoring import (
    Decomposed,
    SiteWeight,
    decompositions,
    factor_specs,
    factored,
    site_weights,
)
from mdltool.compress.ranks import Choice
from mdltool.errors import MdlError
from mdltool.files import write_text
from mdltool.model import MultiDomainModel, build_model
from mdltool.model_spec import ModelSpec, parse_options
from mdltool.model_store import (
    WEIGHTS,
    backbone_with_weights,
    find_backbone,
    read_tensors,
    refuse_fused,
    seeded,
    stored_tensors,
    write_model_json,
)
from mdltool.overrides import apply_override
from mdltool.schema import Recipe
from mdltool.stages.continuing import finetuning
from mdltool.stages.fitting import DomainData, Scope, fit, gather_data
from mdltool.train.checkpoint import save_tensors
from mdltool.train.distributed import join_world
from mdltool.train.plan import Progress
from mdltool.train.together import begin_together, by_main, open_together

_START = "start.safetensors"  # the compressed model that fine-tuning begins from


@dataclass(frozen=True)
class Amount:
    """How much is kept: one of rank (a whole number, or a fraction), energy (a fraction) and budget (text).

    rank_mode: what a fraction is of. energy_scope: of whom. min_rank: under a budget; 0 may drop adapters.
    independent: each domain for itself.
    """

    rank: float | None = None
    energy: float | None = None
    budget: str | None = None
    rank_mode: ranks.RankMode = "per_domain"
    energy_scope: ranks.EnergyScope = "joint"
    min_rank: int = 1
    independent: bool = False


class Svd(BaseModel):
    """Keys under `svd.`: of the decomposition (spec residual_adapters 2.5), and of the fine-tuning.

    scale: which factor holds the singular values. balance: whether domains weigh alike. weighting: of the weights
    under a budget. matricise: which sides of convolutions are shared. train_shared: fine-tune what is shared too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: Literal["left", "sqrt", "right"] = "left"
    balance: Literal["none", "frobenius"] = "none"
    weighting: Literal["relative", "frobenius"] = "relative"
    matricise: Literal["adapter", "out", "in", "filters", "separable", "basis"] = "adapter"
    train_shared: bool = False


@dataclass(frozen=True)
class Finetune:
    """Updates after the compression, on which shards, and changes to the recipe's last step."""

    updates: int
    shards: Sequence[Artifact]
    overrides: Sequence[str] = ()
    resume: bool = False
    workers: int = 1


def parse_svd(overrides: Iterable[str]) -> tuple[Svd, list[str]]:
    """`svd.KEY=VALUE` of the overrides, and the other overrides. Raises MdlError with every fault."""
    content: dict[str, Any] = {}
    rest = []
    for override in overrides:
        if override.startswith("svd."):
            apply_override(content, override)
        else:
            rest.append(override)
    return parse_options(Svd, content.get("svd", {}), "--set svd"), rest


def run(
    source: Artifact,
    amount: Amount,
    out: Path,
    *,
    work: Path,
    svd: Svd | None = None,
    finetune: Finetune | None = None,
) -> Artifact:
    """Compress a model's adapters, and train what is a domain's own a little further.

    Raises MdlError for a model without matrices in its adapters, one that is compressed already, and an amount that
    makes no sense.
    """
    svd = svd or Svd()
    content = source.load_json("model.json")
    refuse_fused(content, source.path)
    spec = ModelSpec.from_json(content["spec"])
    weights = factorable(spec, source, svd.matricise)
    inputs, request, training = _inputs(source, content, work, finetune)
    request |= {"amount": asdict(amount), "svd": svd.model_dump()}
    world = join_world()
    how = "never" if finetune is None else "must" if finetune.resume else "ask"
    draft = begin_together(world, out, kind="model", stage="compress", inputs=inputs, request=request, resume=how)
    if isinstance(draft, Artifact):
        return draft
    progress = None
    with draft or nullcontext():
        spec, table = by_main(world, lambda: _compress(source, spec, weights, amount, svd, draft, training is None))
        if training is not None:
            model = _started(spec, partial_path(out), source, content, work)
    if training is not None and finetune is not None:
        progress = _finetune(model, training, content, svd, partial_path(out), finetune)
    if draft is not None:
        _commit(draft, spec, content, table, amount, progress)
    return open_together(world, out, "model")


def factorable(spec: ModelSpec, source: Artifact, matricise: str = "adapter") -> list[SiteWeight]:
    """What of a model's adapters is matrices. Raises MdlError where nothing is, and for a compressed model."""
    if spec.factors:
        before = next((entry.path for entry in source.inputs if entry.role == "model"), "MODEL")
        raise MdlError("this model is compressed already", source.path, f"compress what it was made from: {before}")
    with torch.device("meta"):
        weights = site_weights(build_model(spec), matricise)
    if not weights:
        kinds = ", ".join(entry.type for entry in spec.adapters)
        what = (
            f"its adapters ({kinds}) have no matrices that domains could share" if kinds else "it has no adapters"
        )
        raise MdlError(f"there is nothing to compress: {what}", source.path, "compress a model with other adapters")
    return weights


@dataclass(frozen=True)
class _Training:
    recipe: Recipe
    data: dict[str, DomainData]


def _inputs(
    source: Artifact, content: Mapping[str, Any], work: Path, finetune: Finetune | None
) -> tuple[list[Input], dict[str, Any], _Training | None]:
    """The artifact's inputs, its request as far as fine-tuning decides it, and what to train on."""
    inputs = [source.as_input("model")]
    backbone = [] if content["own_backbone"] else [e for e in source.inputs if e.role == "backbone"]
    if finetune is None:
        return inputs + backbone, {"finetune": None}, None
    if finetune.updates < 1:
        raise MdlError(f"{finetune.updates} is no number of updates", "--finetune", "a whole number from 1")
    data = gather_data(Recipe.model_validate(content["recipe"]), finetune.shards)
    clips = {name: len(part.train_index) for name, part in data.items()}
    recipe = finetuning(content["recipe"], finetune.updates, clips, finetune.overrides, source)
    inputs += [part.train.as_input("train") for part in data.values()]
    inputs += [part.val.as_input("val") for part in data.values() if part.val is not None]
    inputs += [find_backbone(source, work).as_input("backbone")] if backbone else []
    return inputs, {"finetune": recipe.model_dump(mode="json")}, _Training(recipe, data)


def _compress(
    source: Artifact,
    spec: ModelSpec,
    weights: Sequence[SiteWeight],
    amount: Amount,
    svd: Svd,
    draft: Draft | None,
    final: bool,
) -> tuple[ModelSpec, list[dict[str, Any]]]:
    """Write the compressed tensors into the draft: of every kind of weights, or to fine-tune of the last alone."""
    assert draft is not None, "rank 0 has the draft"
    found: dict[str, Decomposed] = {}
    choices: dict[str, Choice] = {}
    for name in [name for name in WEIGHTS if f"weights/{name}.safetensors" in source.files]:
        tensors = read_model_tensors(source, spec, name)
        own = decompositions(
            weights, tensors, list(spec.domains), independent=amount.independent, balance=svd.balance
        )
        if not choices:  # of the last weights; the others take the same
            found, choices = own, choose(own, amount, svd.weighting)
        file = f"weights/{name}.safetensors" if final else _START
        save_tensors(draft.path / file, factored(tensors, own, choices, svd.scale))
        if not final:
            break
    table = rows(found, choices)
    announce(table, amount, len(spec.domains))
    return replace(spec, factors=factor_specs(found, choices)), table


def read_model_tensors(source: Artifact, spec: ModelSpec, weights: str = "last") -> dict[str, Tensor]:
    """A model's stored tensors. Raises MdlError where they are not those of its spec."""
    path = source.file(f"weights/{weights}.safetensors")
    tensors = read_tensors(path)
    with torch.device("meta"):
        model = build_model(spec)
    model.load_tensors(tensors, path, with_backbone=bool(source.load_json("model.json")["own_backbone"]))
    return tensors


def choose(found: Mapping[str, Decomposed], amount: Amount, weighting: ranks.Weighting) -> dict[str, Choice]:
    """Each weight's rank. Raises MdlError unless one of rank, energy and budget says how much."""
    given = [value for value in (amount.rank, amount.energy, amount.budget) if value is not None]
    if len(given) != 1:
        raise MdlError("say how much is to be kept, in one way", "--rank, --energy, --budget", "e.g. --rank 0.5")
    weights = [entry.for_ranks() for entry in found.values()]
    if amount.rank is not None:
        return ranks.by_rank(weights, amount.rank, amount.rank_mode)
    if amount.energy is not None:
        return ranks.by_energy(weights, amount.energy, amount.energy_scope)
    assert amount.budget is not None
    budget = ranks.parse_budget(amount.budget, sum(weight.dense for weight in weights))
    return ranks.by_budget(weights, budget, weighting, amount.min_rank)


def rows(found: Mapping[str, Decomposed], choices: Mapping[str, Choice]) -> list[dict[str, Any]]:
    """What became of each weight, as plain values; sizes are numbers, of all domains together."""
    table = []
    for name, entry in found.items():
        weight, choice = entry.for_ranks(), choices[name]
        kind = "independent" if entry.independent else "shared"
        heads, shared_dim, private_dim = entry.weight.axes.sizes(entry.weight.shape)
        table.append(
            {
                "site": entry.weight.site,
                "parameter": entry.weight.parameter,
                "heads": list(heads),
                "shared_dim": shared_dim,
                "private_dim": private_dim,
                "form": "dense" if choice.rank is None else "dropped" if choice.rank == 0 else kind,
                "rank": choice.rank,
                "components": len(weight.energies),
                "full": weight.full,
                "clamped": choice.clamped,
                "energy": float(weight.energies.sum()),
                "retained": choice.retained,
                "retained_by_domain": entry.retained(choice.rank),
                "stored": ranks.stored([weight], choices),
                "dense": weight.dense,
            }
        )
    return table


def announce(table: Sequence[Mapping[str, Any]], amount: Amount, domains: int) -> None:
    """Say what the user did not ask for."""
    if domains == 1 and not amount.independent:
        console.say("the model has one domain: nothing is shared, this is its adapters' plain SVD")
    for words, names in (
        ("a rank above what there is, and keep all", [_name(row) for row in table if row["clamped"]]),
        ("no fewer numbers as factors and stay dense", [_name(row) for row in table if row["form"] == "dense"]),
        ("rank 0: their adapters are dropped", [_name(row) for row in table if row["form"] == "dropped"]),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            console.say(f"{len(names)} weight(s) have {words}: {', '.join(names[:3])}{more}")


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['site']} {row['parameter']}"


def _started(
    spec: ModelSpec, folder: Path, source: Artifact, content: Mapping[str, Any], work: Path
) -> MultiDomainModel:
    """The compressed model before fine-tuning."""
    own = bool(content["own_backbone"])
    seeded(content["recipe"]["train"]["seed"])
    model = build_model(spec, backbone_with_weights(spec, None if own else find_backbone(source, work)))
    model.load_tensors(read_tensors(folder / _START), folder / _START, with_backbone=own)
    return model


def _finetune(
    model: MultiDomainModel,
    training: _Training,
    content: Mapping[str, Any],
    svd: Svd,
    folder: Path,
    finetune: Finetune,
) -> Progress:
    own = bool(content["own_backbone"])
    scope = Scope(shared_factors=svd.train_shared)
    progress = fit(
        training.recipe,
        model,
        training.data,
        folder,
        own_backbone=own,
        workers=finetune.workers,
        scope=scope,
    )
    if join_world().is_main:
        save_tensors(folder / "weights" / "last.safetensors", stored_tensors(model.to("cpu"), own))
    return progress


def _commit(
    draft: Draft,
    spec: ModelSpec,
    content: Mapping[str, Any],
    table: Sequence[Mapping[str, Any]],
    amount: Amount,
    progress: Progress | None,
) -> Artifact:
    recipe = content["recipe"]
    with torch.device("meta"):
        counts = build_model(spec).parameter_counts()
    classes = {name: tuple(entry["classes"]) for name, entry in content["domains"].items()}
    write_model_json(draft.path, spec, recipe, classes, bool(content["own_backbone"]), counts)
    write_text(draft.path / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
    write_text(draft.path / "compression.json", json.dumps({"weights": table}, indent=1))
    summary: dict[str, Any] = {
        "recipe": recipe["name"],
        "compressed": totals(table) | {key: value for key, value in asdict(amount).items() if value is not None},
        "domains": {name: {"classes": len(names)} for name, names in classes.items()},
        "parameters": {key: value for key, value in counts.items() if key != "per_domain"},
    }
    if progress is not None:
        summary |= {
            "updates": progress.update,
            "seconds": round(progress.seconds, 2),
            "best_step": progress.best_update,
            "seconds_to_best": None if progress.best_seconds is None else round(progress.best_seconds, 2),
            "val": progress.last_scores,
        }
    return draft.commit(summary, volatile=("metrics.jsonl", "tensorboard"), drop=("checkpoints", _START))


def totals(table: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of all weights together: numbers stored and dense, and the retained fraction of the squared norm."""
    stored, dense = (sum(row[key] for row in table) for key in ("stored", "dense"))
    energy = sum(row["energy"] for row in table)
    kept = sum(row["energy"] * row["retained"] for row in table)
    return {
        "weights": len(table),
        "factored": sum(row["rank"] is not None for row in table),
        "stored": stored,
        "dense": dense,
        "ratio": round(stored / dense, 4),
        "retained": 1.0 if energy == 0 else kept / energy,
    }
