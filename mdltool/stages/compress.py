"""`compress`: a model whose domains' adapters share factors -> model (spec residual_adapters 2.5).

`compression.json` of the artifact says of every weight what became of it, `sweep.json` what other ranks would give.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mdltool.artifact import Artifact, Draft, partial_path
from mdltool.compress.factoring import Decomposed, SiteWeight, decompositions, factor_specs, factored
from mdltool.compress.ranks import Choice
from mdltool.data.index import ShardIndex
from mdltool.files import write_text
from mdltool.model_spec import ModelSpec
from mdltool.model_store import WEIGHTS, label_spaces, refuse_fused, write_description
from mdltool.stages.compression import (
    Amount,
    Finetune,
    Svd,
    Training,
    announce,
    check_amount,
    choose,
    factorable,
    finetuned,
    read_model_tensors,
    rows,
    sizes,
    totals,
    training_of,
)
from mdltool.stages.fitting import Scope
from mdltool.stages.making import commit_model, inputs_of, make_model, progress_summary
from mdltool.stages.sweeping import Sweep, check_sweep, smallest_good, swept
from mdltool.stages.whitening import Calibration, Whiten, check_whiten
from mdltool.train.checkpoint import save_tensors
from mdltool.train.distributed import join_world
from mdltool.train.plan import Progress
from mdltool.train.together import by_main

_START = "start.safetensors"  # the compressed model that fine-tuning begins from
_AS_WRITTEN = Svd()


def run(
    source: Artifact,
    amount: Amount,
    out: Path,
    *,
    work: Path,
    svd: Svd = _AS_WRITTEN,
    finetune: Finetune | None = None,
    sweep: Sweep | None = None,
    whiten: Whiten | None = None,
) -> Artifact:
    """Compress a model's adapters, and train what is a domain's own a little further.

    sweep: also score other ranks; where `amount` says nothing, the smallest rank within a point of the uncompressed
    model is taken. whiten: least error of the outputs on training clips. Raises MdlError for a model without
    matrices in its adapters, one that is compressed already, and an amount that makes no sense.
    """
    content = source.load_json("model.json")
    refuse_fused(content, source.path)
    spec = ModelSpec.from_json(content["spec"])
    check_amount(amount)
    weights = factorable(spec, source, svd.matricise)
    calibration = check_whiten(whiten, content, source) if whiten is not None else None
    job = _Job(source, spec, weights, amount, svd, finetune is None, calibration)
    scored = check_sweep(sweep, content, amount) if sweep is not None else {}
    training = training_of(content["recipe"], content["domains"], finetune, source)
    inputs = inputs_of(source, training.data if training is not None else None, work)
    inputs += [shards.as_input("sweep") for shards, _ in scored.values()]
    inputs += calibration.inputs() if calibration is not None else []

    def make(draft: Draft | None) -> None:
        settled, progress = job, None
        with draft or nullcontext():
            if sweep is not None:
                indices = {domain: index for domain, (_, index) in scored.items()}
                settled = replace(job, amount=_smallest_good(job, sweep, indices, partial_path(out), work))
            spec, table = by_main(join_world(), lambda: _compress(settled, draft, work))
        if training is not None:
            scope = Scope(shared_factors=svd.train_shared)
            progress = finetuned(spec, _START, source, training, scope, out, work)
        if draft is not None:
            _commit(draft, settled, spec, table, progress)

    request, resume = _request(job, training, sweep, whiten), training.resume if training is not None else None
    return make_model(out, make, stage="compress", inputs=inputs, request=request, resume=resume)


@dataclass(frozen=True)
class _Job:
    """final: what is compressed is the result, of every kind of weights; else fine-tuning begins from the last."""

    source: Artifact
    spec: ModelSpec
    weights: Sequence[SiteWeight]
    amount: Amount
    svd: Svd
    final: bool
    calibration: Calibration | None = None

    def decomposed(self, name: str, work: Path) -> tuple[dict[str, Tensor], dict[str, Decomposed]]:
        """The tensors of one kind of weights, and the decompositions of what is matrices among them."""
        tensors = read_model_tensors(self.source, self.spec, name, self.svd.fold_bn)
        measured = self.calibration.moments(self.source, self.weights, name, work) if self.calibration else None
        found = decompositions(
            self.weights,
            tensors,
            list(self.spec.domains),
            independent=self.amount.independent,
            balance=self.svd.balance,
            second_moments=measured,
        )
        return tensors, found


def _request(job: _Job, training: Training | None, sweep: Sweep | None, whiten: Whiten | None) -> dict[str, Any]:
    return {
        "amount": asdict(job.amount),
        "svd": job.svd.model_dump(),
        "finetune": training.recipe.model_dump(mode="json") if training is not None else None,
        "sweep": list(sweep.ranks) if sweep is not None else None,
    } | ({"whiten": whiten.batches} if whiten is not None else {})


def _smallest_good(job: _Job, sweep: Sweep, indices: Mapping[str, ShardIndex], folder: Path, work: Path) -> Amount:
    """What is kept after scoring several ranks, whose table and figure go to the folder."""

    def found() -> dict[str, Decomposed]:
        return job.decomposed("last", work)[1]

    shared = partial(by_main, join_world(), found)
    points = swept(job.source, shared, job.amount, job.svd, sweep, indices, folder, work)
    return smallest_good(points, job.amount)


def _compress(job: _Job, draft: Draft | None, work: Path) -> tuple[ModelSpec, list[dict[str, Any]]]:
    """Write the compressed tensors into the draft."""
    assert draft is not None, "rank 0 has the draft"
    found: dict[str, Decomposed] = {}
    choices: dict[str, Choice] = {}
    amount, svd = job.amount, job.svd
    names = [name for name in WEIGHTS if f"weights/{name}.safetensors" in job.source.files]
    for name in names if job.final else names[:1]:
        tensors, own = job.decomposed(name, work)
        if not choices:  # of the last weights; the others take the same
            found, choices = own, choose(own, amount, svd.weighting)
        file = f"weights/{name}.safetensors" if job.final else _START
        save_tensors(draft.path / file, factored(tensors, own, choices, svd.scale))
    table = rows(found, choices)
    announce(table, amount, len(job.spec.domains))
    return replace(job.spec, factors=factor_specs(found, choices)), table


def _commit(
    draft: Draft, job: _Job, spec: ModelSpec, table: Sequence[dict[str, Any]], progress: Progress | None
) -> None:
    content = job.source.load_json("model.json")
    write_text(draft.path / "compression.json", json.dumps({"weights": table}, indent=1))
    asked = {key: value for key, value in asdict(job.amount).items() if value is not None}
    own = bool(content["own_backbone"])
    summary = write_description(draft.path, spec, content["recipe"], label_spaces(content), own, sizes(spec))
    summary |= {"compressed": totals(table) | asked, **progress_summary(progress)}
    commit_model(draft, summary, drop=(_START,))
