"""Cross-dataset projections: every head's logits, mapped into the label space whose labels a clip has (Liang et
al. 2022, eqs. 4 and 5; spec multitrain 2.3).

Shape suffixes: B clips, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mdltool.errors import MdlError
from mdltool.losses.precision import full, no_autocast
from mdltool.registry import did_you_mean

MODES = ("add", "branch", "none")
INITS = ("trunc_normal", "zero", "names")
INPUTS = ("logits", "softmax")


class Projections(nn.Module):
    """W_ik of shape [C_k, C_i] for every ordered pair (source i, target k) of domains, without bias.

    domains: name -> classes. init: normal with deviation 0.02, cut at two units; zeros; or `names`, 1 where
    class_names have the same class in both domains. input: what a map is applied to. frozen: they do not train.
    (sum C)^2 - sum C^2 parameters. Raises MdlError for an unknown init or input.
    """

    def __init__(
        self,
        domains: Mapping[str, int],
        init: str = "trunc_normal",
        input: str = "logits",
        frozen: bool = False,
        class_names: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__()
        _check(init, INITS, "initialisation of projections", "proj.init")
        _check(input, INPUTS, "input of projections", "proj.input")
        self.pairs = tuple((i, k) for k in domains for i in domains if i != k)
        self.input = input
        maps = {
            _key(source, target): nn.Linear(domains[source], domains[target], bias=False)
            for source, target in self.pairs
        }
        self.maps = nn.ModuleDict(maps)
        for source, target in self.pairs:
            weight = self.weight(source, target)
            if init == "trunc_normal":
                nn.init.trunc_normal_(weight, std=0.02)
            elif init == "zero":
                nn.init.zeros_(weight)
            else:
                assert class_names is not None, "names need the classes' names"
                with torch.no_grad():
                    weight.copy_(same_names(class_names[source], class_names[target]))
        if frozen:
            self.requires_grad_(False)

    def weight(self, source: str, target: str) -> nn.Parameter:
        """W_source,target [C_target, C_source]."""
        weight = self.maps[_key(source, target)].weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def sources(self, target: str) -> list[str]:
        """The domains that are mapped into `target`."""
        return [i for i, k in self.pairs if k == target]

    def forward(self, logits: Mapping[str, Tensor], target: str) -> list[Tensor]:
        """W_ik y_i [B, C_target] for every source; logits: domain -> [B, C]. No gradient is stopped."""
        projected = []
        for source in self.sources(target):
            y_BC = full(logits[source])
            with no_autocast(y_BC):
                if self.input == "softmax":
                    y_BC = y_BC.softmax(dim=-1)
                projected.append(functional.linear(y_BC, self.weight(source, target).to(y_BC.dtype)))
        return projected


def projected_loss(
    logits: Mapping[str, Tensor],
    target: str,
    targets: Tensor,
    projections: Projections,
    mode: str = "add",
    weight: float = 1.0,
) -> Tensor:
    """The loss of each clip of the domain `target` [B], float32 (float64 for float64).

    logits: domain -> [B, C] of these clips from every head. targets: classes, int64 [B], or probabilities
    [B, C_target], whose rows need not sum to 1. add: cross-entropy of y_k + weight * sum_i W_ik y_i. branch:
    cross-entropy of y_k, plus weight times the mean over i of that of W_ik y_i. none: cross-entropy of y_k.
    Raises MdlError for an unknown mode.
    """
    _check(mode, MODES, "mode of projections", "proj.mode")
    y_BC = full(logits[target])
    projected = projections(logits, target) if mode != "none" else []
    if not projected:
        return _cross_entropy(y_BC, targets)
    if mode == "add":
        return _cross_entropy(y_BC + weight * torch.stack(projected).sum(dim=0), targets)
    branches = torch.stack([_cross_entropy(p_BC, targets) for p_BC in projected])
    return _cross_entropy(y_BC, targets) + weight * branches.mean(dim=0)


def same_names(source: Sequence[str], target: Sequence[str]) -> Tensor:
    """[C_target, C_source], 1 where the names are equal but for case, spaces and punctuation, else 0."""
    plain = [[re.sub(r"[\W_]+", "", name.casefold()) for name in names] for names in (target, source)]
    return torch.tensor([[float(bool(t) and t == s) for s in plain[1]] for t in plain[0]])


def _cross_entropy(logits_BC: Tensor, targets: Tensor) -> Tensor:
    soft = targets.is_floating_point()
    return functional.cross_entropy(logits_BC, targets.to(logits_BC.dtype) if soft else targets, reduction="none")


def _key(source: str, target: str) -> str:
    """Where a pair's map is stored. Domain names have no '>', and nothing takes the key apart again."""
    return f"{source}>{target}"


def _check(name: str, names: Sequence[str], noun: str, where: str) -> None:
    if name not in names:
        raise MdlError(f"there is no {noun} '{name}'", where, did_you_mean(name, names))
