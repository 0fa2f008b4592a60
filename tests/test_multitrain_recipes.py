"""MultiTrain's rows: counts, GFLOPs, schedules and the objectives they name (spec multitrain 1, 2.2, 4, 5)."""

from __future__ import annotations

import pytest

from mdltool.data.order import Mixed
from mdltool.recipe import load, shipped
from mdltool.schema import Recipe
from mdltool.stages import describe, plan
from mdltool.train.optim import OptimizerSpec, ScheduleSpec, learning_rate
from tests.figures import check_remarks

BACKBONE, AT_312 = 50_986_176, 51_269_184
HEADS = {"k400": 2_394_512, "k700": 3_009_212, "mit": 2_199_857, "ssv2": 1_931_438, "actnet": 1_984_712}
EXPANDER, WIDE_EXPANDER = 3_148_544, 6_296_320
K400, K700, THREE = 840_940, 1_248_340, 489_340  # projections
FOUR = ("k400", "mit", "ssv2", "actnet")
# row -> (domains, backbone, training-only parameters)
ROWS = {
    "k400": (FOUR, BACKBONE, EXPANDER + K400 + 4),
    "k400_312": (FOUR, AT_312, EXPANDER + K400 + 4),
    "k700": (("k700", *FOUR[1:]), BACKBONE, EXPANDER + K700 + 4),
    "k700_312": (("k700", *FOUR[1:]), AT_312, EXPANDER + K700 + 4),
    "vanilla_50": (FOUR, BACKBONE, 0),
    "vanilla_200": (FOUR, BACKBONE, 0),
    "no_inf": (FOUR, BACKBONE, K400 + 4),
    "no_inf_no_add": (FOUR, BACKBONE, K400 + 4),
    "no_proj": (FOUR, BACKBONE, EXPANDER + 4),
    "no_actnet": (FOUR[:3], BACKBONE, EXPANDER + THREE + 3),
    "release": (FOUR[:3], BACKBONE, WIDE_EXPANDER + THREE),
}


def recipe(row: str) -> Recipe:
    return load(f"multitrain_{row}")


@pytest.mark.parametrize("row", ROWS)
def test_counts(row: str) -> None:
    domains, backbone, training_only = ROWS[row]
    found = describe.run(recipe(row))
    assert found["parameters"]["backbone"] == backbone
    assert {d: entry["head"] for d, entry in found["per_domain"].items()} == {d: HEADS[d] for d in domains}
    assert found["parameters"]["training_only"] == training_only
    assert found["parameters"]["trainable"] == found["parameters"]["total"] + training_only
    expected = 612.40 if "312" in row else 223.13
    assert found["gflops"]["view"] == pytest.approx(expected, abs=0.1)
    figures = check_remarks(f"multitrain_{row}", found["published"])
    assert figures["gflops"]["remark"].startswith("the paper counts LayerNorm")


def test_totals_of_the_released_model() -> None:
    """Spec 2.2's table, by instantiation of the authors' model."""
    for row, inference in (("k400", 59_496_695), ("k700", 60_111_395), ("release", 57_511_983)):
        assert describe.run(recipe(row))["parameters"]["total"] == inference
    released = describe.run(recipe("release"))["parameters"]
    assert released["total"] + released["training_only"] == 64_297_643


def test_single_domain_rows() -> None:
    for row in ("baseline_k400", "baseline_mit", "pretrain_k700", "scratch_16x4", "in21k_16x4"):
        found = recipe(row)
        (domain,) = found.domains
        assert found.train.batches == "in_turn"
        assert found.heads.type == "linear"
        described = describe.run(found)
        assert described["parameters"]["training_only"] == 0, domain
        if found.published is not None:
            check_remarks(f"multitrain_{row}", described["published"])


def test_schedule_of_the_paper() -> None:
    """Spec property 9, in updates of an epoch of 100."""
    (step,) = recipe("k400").train.steps
    schedule = ScheduleSpec("cosine", warmup=1000, warmup_from=step.schedule.warmup_from, final_lr=2e-6)
    rate = learning_rate(schedule, OptimizerSpec("adamw", step.optimizer.lr).lr, 5000, 1)
    found = [rate(100 * epoch) for epoch in (0, 10, 30, 50)]
    assert found == pytest.approx([2e-6, 2e-4, (2e-4 + 2e-6) / 2, 2e-6])
    assert (step.epochs, step.schedule.warmup, step.schedule.unit) == (50, 10, "epoch")


def test_mixed_batches_and_their_domains() -> None:
    clips = {"k400": 40, "mit": 30, "ssv2": 20, "actnet": 10}
    order = plan.order_of(recipe("k400"), clips)
    assert isinstance(order, Mixed)
    (batch,) = next(order.updates(0, 1))
    assert len(batch) == 2 * 512, "repeated augmentation"
    share = plan.share_of(recipe("k400"), 0, 2)
    assert share.pairing == "mirrored"
    whole = recipe("k400")
    assert plan.train_transform(whole, "ssv2").flip == 0
    assert plan.train_transform(whole, "mit").flip == 0.5
    assert [plan.sampling(whole, d).index for d in ("k400", "ssv2")] == ["count", "segments"]
    assert [plan.grid_of(whole, d) for d in ("k400", "ssv2")] == ["3x3", "1x3"]
    released = recipe("release")
    assert [plan.grid_of(released, d) for d in ("k400", "mit", "ssv2")] == ["5x1", "2x3", "1x3"]


def test_every_row_of_the_specification_has_a_recipe() -> None:
    rows = {
        *ROWS,
        *(f"baseline_{d}" for d in HEADS),
        "scratch_16x4",
        "in21k_16x4",
        "pretrain_k400",
        "pretrain_k700",
    }
    assert {name for name in shipped() if name.startswith("multitrain_")} == {f"multitrain_{row}" for row in rows}
