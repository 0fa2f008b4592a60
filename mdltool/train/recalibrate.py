"""`bn: recalibrate`: each domain's BatchNorm statistics, estimated after training (spec omi_mdl 6.4)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mdltool.model import MultiDomainModel
from mdltool.sync_norm import Reduce
from mdltool.types import Batch


@torch.no_grad()
def recalibrate(
    model: MultiDomainModel, batches: Iterable[Batch], device: torch.device, reduce: Reduce | None
) -> None:
    """Replace the statistics by their mean over forward passes of `batches`; the model ends in eval mode.

    reduce: over processes; None: alone.
    """
    norms = list(model.norms.values())
    for norm in norms:
        norm.use_shared = False
        norm.recalibrating = True
        norm.reduce = reduce
        norm.reset_statistics()
    model.eval()
    for norm in norms:
        norm.train()
    for batch in batches:
        model.features(batch.frames.to(device), batch.domain)
    for norm in norms:
        norm.recalibrating = False
    model.eval()
