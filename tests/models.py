"""Small models for tests, by plain values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from mdltool.model import MultiDomainModel, build_model
from mdltool.model_spec import AdapterSpec, ModelSpec

FRAMES, CROP = 4, 32


def tiny_spec(
    adapter: str | None = "2plus1d", sites: Any = "all", domains: Iterable[str] = ("a", "b"), **changes: Any
) -> ModelSpec:
    """A ModelSpec of x3d_tiny; domains: with their outputs, or of three each; changes: adapter options by
    `options`, the rest fields of ModelSpec.
    """
    options = changes.pop("options", {})
    adapters = [AdapterSpec(adapter, sites, options)] if adapter else []
    fields: dict[str, Any] = {
        "backbone": "x3d_tiny",
        "backbone_options": {},
        "num_frames": FRAMES,
        "crop": CROP,
        "domains": dict(domains) if isinstance(domains, Mapping) else dict.fromkeys(domains, 3),
        "adapters": adapters,
        "bn": "shared",
        "dropout": 0.0,
    }
    return ModelSpec(**(fields | changes))


def tiny_model(*args: Any, seed: int = 0, **changes: Any) -> MultiDomainModel:
    """A seeded model of `tiny_spec`, in eval mode, double precision."""
    torch.manual_seed(seed)
    model = build_model(tiny_spec(*args, **changes)).double()
    model.apply_regime("joint", model.spec.bn)
    return model.eval()


def clips(batch: int = 2, frames: int = FRAMES, crop: int = CROP, seed: int = 1) -> torch.Tensor:
    """Normalised random clips, float64 [B, 3, T, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, frames, crop, crop, generator=generator, dtype=torch.float64)
