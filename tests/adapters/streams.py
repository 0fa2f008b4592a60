"""Small models with cross-attention adapters and random streams, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mdltool.model import MultiDomainModel, build_model
from mdltool.model_spec import AdapterSpec, ModelSpec
from mdltool.types import StreamSpec, StreamTokens

SIZES = {"swin3d_tiny": (4, 32), "clip_vit_tiny": (2, 32), "vivit_tiny": (4, 32)}
WIDTH = 12
AUDIO, FLOW, TEXT = (StreamSpec(kind, WIDTH, WIDTH) for kind in ("audio", "flow", "text"))
BOTH = {"audio": AUDIO, "flow": FLOW}


def stream_spec(
    backbone: str = "swin3d_tiny",
    streams: Mapping[str, Mapping[str, StreamSpec]] | None = None,
    mhva: Mapping[str, Any] | None = None,
    **caa: Any,
) -> ModelSpec:
    """Domains a and b with mhva, prefix and caa; b has the streams of a unless `streams` says otherwise."""
    frames, crop = SIZES[backbone]
    streams = streams if streams is not None else {"a": BOTH, "b": BOTH}
    adapters = [
        AdapterSpec("mhva", "all", {"r": 6, "heads": 2, **(mhva or {})}),
        AdapterSpec("prefix", "all", {"length": 2}),
        AdapterSpec("caa", "all", {"d": 8, "heads": 2, **caa}),
    ]
    plain = {domain: dict(entries) for domain, entries in streams.items()}
    return ModelSpec(backbone, {}, frames, crop, {"a": 3, "b": 4}, adapters, "frozen", dropout=0.0, streams=plain)


def stream_model(spec: ModelSpec, seed: int = 0, warm: bool = True) -> MultiDomainModel:
    """In eval mode, double precision; warm: adapters and embedders have random values."""
    torch.manual_seed(seed)
    model = build_model(spec).double()
    model.apply_regime("frozen", "frozen")
    if warm:
        randomise(model)
    return model.eval()


def randomise(model: MultiDomainModel) -> None:
    for key, tensor in model.tensors(with_backbone=False).items():
        if isinstance(tensor, nn.Parameter) and "/head/" not in key:
            nn.init.normal_(tensor, std=0.2)


def clips(spec: ModelSpec, batch: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    size = (batch, 3, spec.num_frames, spec.crop, spec.crop)
    return torch.randn(*size, generator=generator, dtype=torch.float64)


def tokens(*counts: int, width: int = WIDTH, seed: int = 2, longest: int | None = None) -> StreamTokens:
    """Random tokens, so many of each clip, padded with zeros."""
    generator = torch.Generator().manual_seed(seed)
    mask_BM = torch.arange(longest or max(1, *counts)) < torch.tensor(counts)[:, None]
    full_BMD = torch.randn(*mask_BM.shape, width, generator=generator, dtype=torch.float64)
    return StreamTokens(full_BMD * mask_BM[..., None], mask_BM)


def both(*counts: int) -> dict[str, StreamTokens]:
    return {"audio": tokens(*counts), "flow": tokens(*counts[::-1], seed=3)}
