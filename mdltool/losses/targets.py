"""Soft targets of a mixed batch: label smoothing, and mixup or cutmix across datasets (spec multitrain 5.3).

Shape suffixes: B clips, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def soft_targets(
    labels_B: Tensor,
    domain_B: Tensor,
    domains: Mapping[str, int],
    smoothing: float = 0.1,
    smooth_classes: int | None = None,
) -> dict[str, Tensor]:
    """domain -> float32 [B, C]: rows of its own clips sum to 1, the others are zero.

    labels_B: int64, each in its own domain's classes. domain_B: int64, positions in `domains`. smooth_classes: one
    class count for every domain, the authors' slip, whose rows do not sum to 1; None: the domain's own.
    """
    soft = {}
    for k, (name, classes) in enumerate(domains.items()):
        off = smoothing / (smooth_classes or classes)
        own_B = domain_B == k
        rows_BC = torch.full((len(labels_B), classes), off, device=labels_B.device)
        # Another domain's label may lie beyond these classes; its row is cleared anyway.
        rows_BC.scatter_(1, labels_B.where(own_B, 0)[:, None], 1 - smoothing + off)
        soft[name] = rows_BC * own_B[:, None]
    return soft


def mixed_targets(
    labels_B: Tensor,
    domain_B: Tensor,
    domains: Mapping[str, int],
    partner_B: Tensor,
    own_share: float | Tensor,
    *,
    smoothing: float = 0.1,
    smooth_classes: int | None = None,
    both: bool = False,
) -> dict[str, Tensor]:
    """As soft_targets, of clips that are own_share (a number or [B]) themselves and for the rest clip partner_B.

    A partner of the same domain adds its label. One of another adds nothing (`aug.mix_scope: masked`), so that the
    row sums to own_share; or with `both` its share in its own domain's loss. With smooth_classes the nothing is
    filled with the smoothing's floor, as the authors' code does. `same` is a matter of whom partner_B names.
    """
    soft = soft_targets(labels_B, domain_B, domains, smoothing, smooth_classes)
    own_B1 = torch.as_tensor(own_share, device=labels_B.device).expand(len(labels_B))[:, None]
    same_B1 = (domain_B == domain_B[partner_B])[:, None]
    mixed = {}
    for k, (name, rows_BC) in enumerate(soft.items()):
        partner_BC = rows_BC[partner_B]
        if not both:
            partner_BC = partner_BC * same_B1
            if smooth_classes is not None:
                stranger_B1 = (domain_B == k)[:, None] & ~same_B1
                partner_BC = partner_BC + stranger_B1 * (smoothing / smooth_classes)
        mixed[name] = own_B1 * rows_BC + (1 - own_B1) * partner_BC
    return mixed
