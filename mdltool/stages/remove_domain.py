"""`model rm`: a model without one of its domains, everything else bit-identical."""

from __future__ import annotations

from pathlib import Path

from mdltool.artifact import Artifact, begin
from mdltool.errors import MdlError
from mdltool.model_store import (
    WEIGHTS,
    find_backbone,
    label_spaces,
    load_model,
    reduced,
    refuse_fused,
    stored_tensors,
    write_description,
)
from mdltool.registry import did_you_mean
from mdltool.stages.plan import without_domain
from mdltool.train.checkpoint import save_tensors


def run(source: Artifact, domain: str, out: Path, *, work: Path) -> Artifact:
    """Write the model without `domain`. Raises MdlError for an unknown domain, and for the only one."""
    content = source.load_json("model.json")
    refuse_fused(content, source.path)
    domains = label_spaces(content)
    if domain not in domains:
        raise MdlError(f"the model has no domain '{domain}'", source.path, did_you_mean(domain, domains))
    if len(domains) == 1:
        raise MdlError(f"'{domain}' is the model's only domain", source.path, "remove the artifact's directory")
    own = bool(content["own_backbone"])
    inputs = [source.as_input("model")] + ([] if own else [find_backbone(source, work).as_input("backbone")])
    draft = begin(out, kind="model", stage="model rm", inputs=inputs, request={"domain": domain})
    if isinstance(draft, Artifact):
        return draft
    kept = {name: space for name, space in domains.items() if name != domain}
    recipe = without_domain(content["recipe"], domain)
    with draft:
        for weights in [name for name in WEIGHTS if f"weights/{name}.safetensors" in source.files]:
            model = reduced(load_model(source, weights, work), domain)
            save_tensors(draft.path / "weights" / f"{weights}.safetensors", stored_tensors(model, own))
        counts = model.parameter_counts()
        summary = write_description(draft.path, model.spec, recipe, kept, own, counts)
        return draft.commit(summary | {"removed": domain})
