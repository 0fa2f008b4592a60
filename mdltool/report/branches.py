"""The learned weights of MST-Adapter's branches, block by block (MST-Adapter, eq. 8 and Figure 7)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from mdltool.adapters.mst_adapter import MstAdapter
from mdltool.artifact import Artifact
from mdltool.errors import MdlError
from mdltool.model import ModelSpec, build_model
from mdltool.report import page, plots

PLACES = {
    "entry": "before the block",
    "norm1_in": "before attention's norm",
    "attn_in": "before attention",
    "attn_out": "after attention",
    "mid": "after attention's residual",
    "norm2_in": "before the MLP's norm",
    "mlp_in": "before the MLP",
    "mlp_out": "after the MLP",
    "exit": "after the MLP's residual",
}
FIGURE_7 = (
    "Figure 7 of the MST-Adapter paper finds the large branch heavier in layers 1-8 of its 12 and the small branch "
    "heavier in layers 9-12."
)
DEAD = (
    "Equal weights are still where they started: with a class-token readout no gradient reaches the branches after "
    "the last attention."
)
Weights = Mapping[int, Mapping[str, Sequence[float]]]


@dataclass(frozen=True)
class Branches:
    """What one domain's adapters multiply their branches with. kernels: names, the small branch first.
    weights: block from 1 -> role of the place in the block -> one weight for each kernel.
    """

    domain: str
    kernels: tuple[str, ...]
    weights: Weights


def read(model: Artifact, weights: str) -> list[Branches]:
    """The branch weights of a model artifact by domain and set of kernels; [] where none are learned.

    weights: last or best. Raises MdlError for a file that cannot be read.
    """
    spec = ModelSpec.from_json(model.load_json("model.json")["spec"])
    if not any(entry.type == "mst" for entry in spec.adapters):
        return []
    with torch.device("meta"):
        shape = build_model(spec)  # says of each stored name which block, place and fusion it belongs to
    path = model.file(f"weights/{weights}.safetensors")
    found: dict[tuple[str, tuple[str, ...]], dict[int, dict[str, list[float]]]] = {}
    try:
        with safe_open(path, "pt") as stored:
            for name, wrapper in shape.sites.items():
                for domain, adapter in wrapper.adapters.items():
                    if isinstance(adapter, MstAdapter) and "weights" in dict(adapter.named_parameters()):
                        adapter.weights = nn.Parameter(stored.get_tensor(f"{domain}/{name}/weights").float())
                        blocks = found.setdefault((domain, _kernels(adapter)), defaultdict(dict))
                        blocks[wrapper.site.layer][wrapper.site.role] = adapter.branch_weights().tolist()
    except (SafetensorError, OSError) as error:
        raise MdlError(
            f"this safetensors file cannot be read ({error})", path, "mdltool inspect --verify"
        ) from None
    return [Branches(domain, kernels, dict(sorted(w.items()))) for (domain, kernels), w in found.items()]


def show(model: Artifact, weights: str) -> str:
    """The table and the plot of each domain, and what the paper finds; '' for a model without learned weights."""
    parts = []
    for entry in read(model, weights):
        roles = _roles(entry.weights)
        columns = [f"{PLACES[role]}, {kernel}" for role in roles for kernel in entry.kernels]
        blank = [None] * len(entry.kernels)
        rows = [
            (block, *("" if a is None else f"{a:.3f}" for role in roles for a in places.get(role, blank)))
            for block, places in entry.weights.items()
        ]
        drawn = plots.branches(
            {
                PLACES[role]: {
                    kernel: [(block, places[role][i]) for block, places in entry.weights.items() if role in places]
                    for i, kernel in enumerate(entry.kernels)
                }
                for role in roles
            }
        )
        parts += [
            page.heading(entry.domain),
            page.table(("block", *columns), rows, "Learned branch weights, as they are"),
            page.figures({"learned branch weights": drawn}),
            page.paragraph(compare(entry)),
        ]
    return "".join([*parts, page.paragraph(FIGURE_7)]) if parts else ""


def compare(entry: Branches) -> str:
    """In which blocks the large branch is heavier than the small one, by the mean magnitude over the block."""
    small, large = entry.kernels[0], entry.kernels[-1]
    gaps = {block: sum(abs(a[-1]) - abs(a[0]) for a in places.values()) for block, places in entry.weights.items()}
    said = [
        f"the {size} branch ({kernel}) is the heavier one in {_ranges(blocks)}"
        for size, kernel, blocks in (
            ("large", large, [block for block, gap in gaps.items() if gap > 0]),
            ("small", small, [block for block, gap in gaps.items() if gap < 0]),
        )
        if blocks
    ]
    text = f"Here, by magnitude, {' and '.join(said)}." if said else "Here no branch is heavier than another."
    still = any(len(set(a)) == 1 for places in entry.weights.values() for a in places.values())
    return f"{text} {DEAD}" if still else text


def _roles(weights: Weights) -> list[str]:
    """Roles in the order of a block's places."""
    used = {role for places in weights.values() for role in places}
    return [role for role in PLACES if role in used]


def _kernels(adapter: MstAdapter) -> tuple[str, ...]:
    names = []
    for branch in adapter.branches:
        assert isinstance(branch, nn.Conv3d)
        step = max(branch.dilation)
        names.append("x".join(map(str, branch.kernel_size)) + (f" dilated by {step}" if step > 1 else ""))
    return tuple(names)


def _ranges(blocks: Sequence[int]) -> str:
    """[1, 2, 3, 7] -> "blocks 1-3, 7"."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    noun = "block" if len(blocks) == 1 else "blocks"
    return f"{noun} {', '.join(str(r[0]) if len(r) == 1 else f'{r[0]}-{r[-1]}' for r in runs)}"
