"""`model split`: one domain of a model as a file of its own."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from mdltool.artifact import Artifact
from mdltool.domain_pack import DomainPack, model_form
from mdltool.errors import MdlError
from mdltool.files import write_bytes
from mdltool.model_store import load_model, refuse_fused
from mdltool.registry import did_you_mean
from mdltool.schema import Recipe
from mdltool.stages.continuing import recipe_of
from mdltool.types import LabelSpace


def run(source: Artifact, domain: str, out: Path, *, weights: str = "last", work: Path) -> dict[str, Any]:
    """Write the file `out`, or find it there. Returns {"artifact", "kind", "digest" (sha256), "summary"}.

    Raises MdlError for an unknown domain, and where another file is there.
    """
    content = source.load_json("model.json")
    refuse_fused(content, source.path)
    domains = content["domains"]
    if domain not in domains:
        raise MdlError(f"the model has no domain '{domain}'", source.path, did_you_mean(domain, domains))
    model = load_model(source, weights, work)
    own = model.tensors(with_backbone=False)
    pack = DomainPack(
        domain=domain,
        space=LabelSpace.from_json(domains[domain]),
        outputs=model.spec.domains[domain],
        model=model_form(model.spec),
        **model.digests(),
        recipe=recipe_of(Recipe.model_validate(content["recipe"]), domain),
        streams=model.spec.streams.get(domain, {}),
        tensors={k.removeprefix(f"{domain}/"): t for k, t in own.items() if k.startswith(f"{domain}/")},
    )
    data = pack.to_bytes()
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(out, data)
    elif not out.is_file() or out.read_bytes() != data:
        raise MdlError("something else is already there", out, "give another --out, or remove it")
    summary = {
        "domain": domain,
        "classes": len(pack.space.classes),
        "parameters": model.parameter_counts()["per_domain"][domain],
        "bytes": len(data),
        "backbone": pack.backbone,
        "shared": pack.shared,
    }
    return {
        "artifact": str(out),
        "kind": "domain",
        "digest": hashlib.sha256(data).hexdigest(),
        "summary": summary,
    }
