"""`inspect --projections`: which classes a model's projections connect (Liang et al. 2022, Table 4)."""

from __future__ import annotations

from typing import Any

from mdltool.artifact import Artifact
from mdltool.errors import MdlError
from mdltool.model_store import read_tensors

FILE = "weights/training.safetensors"
_MAPS = "criterion.projections.maps."


def run(artifact: Artifact, topk: int = 5) -> list[dict[str, Any]]:
    """For each ordered pair of domains the class pairs with the largest weights, the greatest first.

    Returns [{"source", "target", "pairs": [{"source_class", "target_class", "weight"}]}]. Raises MdlError for a
    model that was trained without projections.
    """
    weights = read_tensors(artifact.file(FILE)) if FILE in artifact.files else {}
    classes = {name: part["classes"] for name, part in artifact.load_json("model.json")["domains"].items()}
    found = []
    for target in classes:
        for source in classes:
            weight = weights.get(f"{_MAPS}{source}>{target}.weight")
            if weight is None:
                continue
            values, places = weight.flatten().topk(min(topk, weight.numel()))
            pairs = [
                {
                    "source_class": classes[source][place % weight.shape[1]],
                    "target_class": classes[target][place // weight.shape[1]],
                    "weight": value,
                }
                for value, place in zip(values.tolist(), places.tolist(), strict=True)
            ]
            found.append({"source": source, "target": target, "pairs": pairs})
    if not found:
        raise MdlError(
            "this model has no projections between its domains",
            artifact.path,
            "train one with losses.proj, as multitrain_k400 does",
        )
    return found
