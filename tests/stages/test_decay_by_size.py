"""`train.decay_by_size` (spec residual_adapters 5 and 7, 13): the paper's decays come out of the paper's counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from mdltool.artifact import open_artifact
from mdltool.data.index import ShardIndex
from mdltool.recipe import load, shipped
from mdltool.stages.fitting import train_spec
from mdltool.stages.plan import decay_for, decays_of, order_of
from mdltool.train.plan import TrainSpec
from tests.conftest import Ran, World

# Table 1's counts of pictures, and the decay that section 4.1 gives each
PAPER = {
    "aircraft": (7_000, 0.002),
    "cifar100": (50_000, 0.0001),
    "dped": (30_000, 0.0005),
    "dtd": (4_000, 0.002),
    "gtsrb": (40_000, 0.0001),
    "flowers": (2_000, 0.002),
    "omniglot": (26_000, 0.0005),
    "svhn": (70_000, 0.0001),
    "ucf101": (9_000, 0.0005),
}
COUNTS = {name: count for name, (count, _) in PAPER.items()}
DECAYS = {name: decay for name, (_, decay) in PAPER.items()}


def spec_of(name: str, counts: Mapping[str, int], *overrides: str) -> TrainSpec:
    recipe = load(name, overrides)
    return train_spec(recipe, "per_domain", order_of(recipe, counts), counts)


def test_the_papers_counts_give_the_papers_decays() -> None:
    assert {name: decay_for(count) for name, count in COUNTS.items()} == DECAYS
    bounds = (7_999, 8_000, 34_999, 35_000)
    assert [decay_for(count) for count in bounds] == [0.002, 0.0005, 0.0005, 0.0001]


NINE = [name for name in shipped() if name.startswith("residual_") and set(load(name).domains) == set(PAPER)]


@pytest.mark.parametrize("name", NINE)
def test_recipes_take_the_papers_decays(name: str) -> None:
    domains = load(name).domains
    assert {domain: part.weight_decay for domain, part in domains.items()} == DECAYS
    unflipped = {domain for domain, part in domains.items() if part.flip == 0}
    assert unflipped == {"gtsrb", "omniglot", "svhn"}, "what a mirror changes"


def test_a_domains_own_decay_goes_first() -> None:
    sets = ["train.decay_by_size=true", *(f"domains.{d}.weight_decay=null" for d in PAPER)]
    assert decays_of(load("residual_parallel", sets), COUNTS) == DECAYS
    own = [*sets, "domains.svhn.weight_decay=0.3"]
    assert decays_of(load("residual_parallel", own), COUNTS) == DECAYS | {"svhn": 0.3}
    off = ["train.decay_by_size=false", *sets[1:], "domains.svhn.weight_decay=0.3"]
    assert decays_of(load("residual_parallel", off), COUNTS) == {"svhn": 0.3}


@pytest.mark.parametrize(("count", "decay"), [(2_000, 0.002), (50_000, 0.0001)])
def test_of_one_domain_the_backbone_takes_it_too(count: int, decay: float) -> None:
    sets = ("train.decay_by_size=true", "train.steps.0.optimizer.weight_decay=0.7")
    spec = spec_of("residual_finetune", {"cifar100": count}, *sets)
    assert [step.optimizer.weight_decay for step in spec.steps] == [decay]
    spec = spec_of("residual_finetune", {"cifar100": count}, sets[1])
    assert [step.optimizer.weight_decay for step in spec.steps] == [0.7]


def test_several_domains_leave_what_they_share_to_the_optimizer() -> None:
    spec = spec_of("residual_parallel", COUNTS, "train.decay_by_size=true")
    assert [step.optimizer.weight_decay for step in spec.steps] == [0.0005]


def test_train_says_what_each_domain_takes(world: World, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    shards = {
        d: [ShardIndex.open(open_artifact(world.shards(d, s))) for s in ("train", "val")] for d in ("chalk", "neon")
    }
    sets = ("--set", "train.decay_by_size=true", "--set", "train.steps.0.updates=1", "--set", "val.every=0")
    words = [*world.train_words(), *sets, "--out", tmp_path / "m", "--workers", 0]
    ran = mdltool(*words)
    assert ran.code == 0, ran.err
    clips = {domain: sum(map(len, splits)) for domain, splits in shards.items()}
    assert (
        f"weight decay by size: chalk 0.002 ({clips['chalk']} clips), neon 0.002 ({clips['neon']} clips)" in ran.err
    )
