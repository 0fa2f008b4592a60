"""What MST-Adapters learned: the weights of their three branches, block by block (spec mst_adapter 1)."""

from __future__ import annotations

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from mdltool.adapters.mst_adapter import MstAdapter
from mdltool.artifact import Artifact
from mdltool.errors import MdlError
from mdltool.model import build_model
from mdltool.model_spec import ModelSpec
from mdltool.report import page, plots

KERNELS = ("first kernel", "second kernel", "third kernel")
NOTE = (
    "The kernels are those of the recipe, by default 3, 5 and 7 frames. Figure 7 of the MST-Adapter paper finds "
    "the large branch heavier in blocks 1 to 8 and the small one heavier in blocks 9 to 12. With a class-token "
    "readout no gradient reaches the branches after the last attention; their weights stay where they started."
)
Row = tuple[int, str, list[float]]  # block from 1, place in the block, what each branch is multiplied with


def branch_weights(model: Artifact, weights: str = "last") -> dict[str, list[Row]]:
    """Domain -> rows by block and place; {} for a model without learned branch weights.

    weights: last or best. Raises MdlError for a file that cannot be read.
    """
    spec = ModelSpec.from_json(model.load_json("model.json")["spec"])
    if not any(entry.type == "mst" for entry in spec.adapters):
        return {}
    with torch.device("meta"):
        shape = build_model(spec)  # says which block, place and fusion a stored name belongs to
    path = model.file(f"weights/{weights}.safetensors")
    found: dict[str, list[Row]] = {}
    try:
        with safe_open(path, "pt") as stored:
            for name, wrapper in shape.sites.items():
                for domain, adapter in wrapper.adapters.items():
                    if isinstance(adapter, MstAdapter) and "weights" in dict(adapter.named_parameters()):
                        adapter.weights = nn.Parameter(stored.get_tensor(f"{domain}/{name}/weights"))
                        row = (wrapper.site.layer, wrapper.site.role, adapter.branch_weights().tolist())
                        found.setdefault(domain, []).append(row)
    except (SafetensorError, OSError) as error:
        raise MdlError(
            f"this safetensors file cannot be read ({error})", path, "mdltool inspect --verify"
        ) from None
    return {domain: sorted(rows) for domain, rows in found.items()}


def section(model: Artifact, weights: str = "last") -> str:
    """The plot and the table of each domain, and what the paper finds; '' where there are no such weights."""
    parts = []
    for domain, rows in branch_weights(model, weights).items():
        lines: dict[str, list[tuple[float, float]]] = {}
        for place in sorted({place for _, place, _ in rows}):
            for i, kernel in enumerate(KERNELS):
                lines[f"{place}, {kernel}"] = [(block, values[i]) for block, at, values in rows if at == place]
        drawn = {f"{domain}: weight of each branch": plots.curves(lines, "weight", across="block")}
        cells = [(block, place, *(f"{value:.3f}" for value in values)) for block, place, values in rows]
        table = page.table(("block", "place", *KERNELS), cells)
        parts.append(page.heading(domain) + page.figures(drawn) + table)
    return page.paragraph(NOTE) + "".join(parts) if parts else ""
