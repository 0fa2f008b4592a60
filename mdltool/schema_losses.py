"""The shape of a recipe's `losses`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class InformativePart(Part):
    """Variance and covariance of expanded embeddings (spec multitrain 2.4). accum: over all of an update's clips,
    or of each micro-batch for itself.
    """

    lambda_v: Annotated[float, Field(ge=0)] = 1.0
    lambda_c: Annotated[float, Field(ge=0)] = 1.0
    eps: Annotated[float, Field(gt=0)] = 1e-4
    expander_hidden: Annotated[int, Field(ge=1)] = 2048
    learned: bool = False
    accum: Literal["exact", "local"] = "exact"


class ProjectionPart(Part):
    """Maps between the domains' logits (spec multitrain 2.3)."""

    mode: Literal["add", "branch"] = "add"
    weight: Annotated[float, Field(ge=0)] = 1.0
    input: Literal["logits", "softmax"] = "logits"
    init: Literal["trunc_normal", "zero", "names"] = "trunc_normal"
    freeze: bool = False


class LossWeights(Part):
    """Of the domains' losses: learned, or fixed (spec multitrain 2.5)."""

    mode: Literal["uncertainty", "fixed"] = "uncertainty"
    half: bool = True
    sigma_init: Literal["one", "uniform"] = "one"


class Losses(Part):
    """inf, proj, weights: MultiTrain's, each left out unless named; weights left out are the domains' `weight`.
    norm: what a domain's sum is divided by, the batch's clips or its own.
    """

    reduction: Literal["mean", "sum"] = "mean"
    domain_average: bool = False
    norm: Literal["batch", "dataset"] = "batch"
    inf: InformativePart | None = None
    proj: ProjectionPart | None = None
    weights: LossWeights | None = None
