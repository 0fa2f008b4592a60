"""`compress --whiten`: what enters the adapters' weights on training clips. No stage itself."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdltool import console
from mdltool.artifact import Artifact, Input
from mdltool.compress.factoring import SiteWeight
from mdltool.compress.moments import moments_of, watch
from mdltool.data.index import ShardIndex
from mdltool.model_store import load_model
from mdltool.schema import Recipe
from mdltool.stages.fitting import DomainData, check_domain, score_split, sort_shards
from mdltool.stages.sources import check_sources
from mdltool.train.distributed import World


@dataclass(frozen=True)
class Whiten:
    """On which shards, and how many of the recipe's batches of each domain."""

    shards: Sequence[Artifact]
    batches: int = 8
    workers: int = 1


@dataclass(frozen=True)
class Calibration:
    """Whiten with shards that are the model's."""

    recipe: Recipe
    data: Mapping[str, DomainData]
    whiten: Whiten

    def inputs(self) -> list[Input]:
        """What the decomposition depends on beside the model."""
        return [part.train.as_input("calibration") for part in self.data.values()]

    def moments(
        self, source: Artifact, weights: Sequence[SiteWeight], name: str, work: Path
    ) -> dict[str, dict[str, Tensor]]:
        """Weight's name -> domain -> its inputs' second moment, with the source's `name` weights.

        Clips as validation shows them: what the model is used on. One process does it.
        """
        model = load_model(source, name, work)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").channels_last()
        watched = watch(model, weights)
        with console.progress("calibrate", len(self.data), "domains") as advance:
            for domain, part in self.data.items():
                index = _some(part.train_index, self.whiten.batches * self.recipe.batch_of(domain))
                score_split(self.recipe, model, domain, index, self.whiten.workers, World())
                advance()
        found = {key: {d: m.cpu() for d, m in own.items()} for key, own in moments_of(watched).items()}
        console.say(f"{len(found)} of {len(weights)} weights are whitened by what enters them")
        return found


def check_whiten(whiten: Whiten, content: Mapping[str, Any], source: Artifact) -> Calibration:
    """Raise MdlError for shards that are not the model's, and a domain without training shards."""
    recipe = Recipe.model_validate(content["recipe"])
    for artifact in whiten.shards:
        index = ShardIndex.open(artifact)
        check_domain(artifact, index, content["domains"])
        check_sources(recipe, index)
    return Calibration(recipe, sort_shards(recipe, whiten.shards), whiten)


def _some(index: ShardIndex, clips: int) -> ShardIndex:
    """So many clips, the same ones whatever the shards."""
    ranks = [hashlib.sha256(key.encode()).digest() for key in index.keys]
    return index.take(np.array(sorted(sorted(range(len(index)), key=ranks.__getitem__)[:clips]), dtype=np.int64))
