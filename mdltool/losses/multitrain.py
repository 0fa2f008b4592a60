"""The objective of multi-dataset training (Liang et al. 2022, eq. 6; spec multitrain 2.3 to 2.5 and 6.1).

Shape suffixes: B clips of a mixed batch, F features, C classes.

Several processes, or several micro-batches, share one objective: each calls with its own clips and an `Update`
that says what the whole batch is. Sums over clips are divided by the whole batch's counts, and what belongs to
the whole batch is divided by the number of calls, so that the SUM of the calls' totals, and of their gradients, is
the objective of the concatenated batch and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mdltool.errors import MdlError
from mdltool.losses import WEIGHTINGS
from mdltool.losses.informative import Expander, defined, informative_loss
from mdltool.losses.precision import full
from mdltool.losses.projection import MODES, Projections, projected_loss
from mdltool.losses.weighting import FixedWeights, UncertaintyWeights
from mdltool.registry import did_you_mean

NORMS = ("batch", "dataset")
_INFORMATIVE = ("variance", "covariance")


@dataclass(frozen=True)
class MultitrainSpec:
    """The options of spec multitrain 3 that shape the objective, as plain values.

    lambda_v, lambda_c: of the informative terms; both 0: no expander. informative_learned: learned weights for
    them too, on top of the lambdas. norm: sums over a domain's clips are divided by the batch or by the domain's
    clips. fixed_weights: of `weights: fixed`, 1 where not given.
    """

    lambda_v: float = 1.0
    lambda_c: float = 1.0
    eps: float = 1e-4
    expander_hidden: int = 2048
    informative_learned: bool = False
    proj_mode: str = "add"
    proj_weight: float = 1.0
    proj_input: str = "logits"
    proj_init: str = "trunc_normal"
    proj_freeze: bool = False
    norm: str = "batch"
    weights: str = "uncertainty"
    weights_half: bool = True
    sigma_init: str = "one"
    fixed_weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """The whole batch that a call's clips belong to.

    clips: B of all calls. counts: domain -> its clips among them; 0 or missing: absent. calls: how many totals are
    summed, processes times micro-batches. gather: rows [b, F] of this call -> rows [B, F] of all, with gradient:
    backward must add up, for this call's rows, what reaches them in every call, as that of
    torch.distributed.nn.functional.all_gather does. None: the rows are all there are. Padding is taken out before.
    """

    clips: int
    counts: Mapping[str, int]
    calls: int = 1
    gather: Callable[[Tensor], Tensor] | None = None


class MultitrainLoss(nn.Module):
    """Informative loss, projections and loss weights: everything that only training needs.

    features: F. domains: name -> classes; a domain's index is its position. class_names: for `proj_init: names`.
    Raises MdlError for options that do not exist.
    """

    def __init__(
        self,
        features: int,
        domains: Mapping[str, int],
        spec: MultitrainSpec,
        class_names: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__()
        _check(spec, domains)
        self.spec = spec
        self.domains = tuple(domains)
        self.classes = dict(domains)
        informative = spec.lambda_v != 0 or spec.lambda_c != 0
        self.expander = Expander(features, spec.expander_hidden) if informative else None
        self.projections = Projections(
            domains if spec.proj_mode != "none" else {},
            spec.proj_init,
            spec.proj_input,
            spec.proj_freeze,
            class_names,
        )
        self.weights = _weights(spec, domains)
        self.informative_weights: UncertaintyWeights | None = None
        if informative and spec.informative_learned:
            self.informative_weights = UncertaintyWeights(_INFORMATIVE, spec.weights_half, spec.sigma_init)

    def classification(
        self,
        domain_B: Tensor,
        logits: Mapping[str, Tensor],
        targets: Tensor | Mapping[str, Tensor],
        update: Update,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(weighted sum of the domains' losses, {domain: L_k}), of the domains that the update has clips of.

        domain_B: int64 [B]. logits: domain -> [B, C], of every head on every clip. targets: each clip's class in
        its own domain, int64 [B]; or domain -> probabilities [B, C], where a row of another domain's clip is zero,
        or what mixing gives that clip in this domain.
        """
        losses = {}
        for k, name in enumerate(self.domains):
            clips = update.counts.get(name, 0)
            if clips == 0:
                continue
            rows_N, chosen = _rows(domain_B, k, targets if isinstance(targets, Tensor) else targets[name])
            heads = (name, *self.projections.sources(name))
            own = {domain: logits[domain].index_select(0, rows_N) for domain in heads}
            spec = self.spec
            per_clip = projected_loss(own, name, chosen, self.projections, spec.proj_mode, spec.proj_weight)
            losses[name] = per_clip.sum() / (update.clips if spec.norm == "batch" else clips)
        terms = self.weights(losses, 1 / update.calls)
        return torch.stack(list(terms.values())).sum(), losses

    def informative(self, z_BF: Tensor, update: Update) -> tuple[Tensor, dict[str, Tensor]]:
        """(this call's part of the weighted terms, {"variance": L_v, "covariance": L_c}); zeros where the whole
        batch has a single clip.

        z_BF: embeddings of this call's clips. What is gathered is the expander's output.
        """
        if self.expander is None:
            zero = torch.zeros((), device=z_BF.device)
            return zero, dict.fromkeys(_INFORMATIVE, zero)
        expanded_BF = full(self.expander(z_BF))
        if update.gather is not None:
            expanded_BF = update.gather(expanded_BF)
        variance, covariance = informative_loss(expanded_BF, self.spec.eps)
        parts = {"variance": variance, "covariance": covariance}
        if not defined(expanded_BF):  # nothing to weigh: learned weights would fall for ever
            return variance + covariance, parts
        share = 1 / update.calls
        terms = {
            "variance": self.spec.lambda_v * variance * share,
            "covariance": self.spec.lambda_c * covariance * share,
        }
        if self.informative_weights is not None:
            terms = self.informative_weights(terms, share)
        return terms["variance"] + terms["covariance"], parts


def _check(spec: MultitrainSpec, domains: Mapping[str, int]) -> None:
    for where, name, names in (("loss.norm", spec.norm, NORMS), ("proj.mode", spec.proj_mode, MODES)):
        if name not in names:
            raise MdlError(f"'{name}' is no choice", where, did_you_mean(name, names))
    for name in spec.fixed_weights:
        if name not in domains:
            raise MdlError(f"there is no domain '{name}'", "weights.fixed", did_you_mean(name, domains))


def _weights(spec: MultitrainSpec, domains: Mapping[str, int]) -> UncertaintyWeights | FixedWeights:
    weighting = WEIGHTINGS.load(spec.weights, "weights.mode")
    if weighting is FixedWeights:
        return FixedWeights(spec.fixed_weights)
    return UncertaintyWeights(domains, spec.weights_half, spec.sigma_init)


def _rows(domain_B: Tensor, k: int, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(numbers of the N clips that domain k's loss is about, their targets)."""
    about_B = domain_B == k
    if targets.is_floating_point():
        about_B = about_B | (targets != 0).any(dim=1)
    rows_N = about_B.nonzero().squeeze(1)
    return rows_N, targets.index_select(0, rows_N)
