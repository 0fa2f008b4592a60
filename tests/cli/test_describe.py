"""What `describe` prints to a reader, and what `recipe list` says of the printed rows."""

from __future__ import annotations

from collections.abc import Callable

from mdltool.recipe import load
from mdltool.stages import describe
from tests.conftest import Ran


def cells(out: str) -> dict[str, list[str]]:
    """First cell -> the others, of the rows of all tables."""
    rows = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in out.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) > 1}


def test_describe_prints_every_part_and_the_papers_figures_beside_ours(mdltool: Callable[..., Ran]) -> None:
    """Counts of spec mst_adapter 3.1 and 4."""
    ran = mdltool("describe", "mst_k400_b16_8", "--paper")
    assert ran.code == 0
    found = cells(ran.out)
    assert found["backbone"][:2] == ["85,799,424", "85.80"]
    assert found["projection"][:2] == ["393,216", "0.39"]
    assert found["heads"][:2] == ["307,600", "0.31"]
    assert found["adapters"][:2] == ["17,897,544", "17.90"]
    assert found["trainable"] == ["18,205,144", "18.21", "21.2% of the backbone"]
    assert found["k400"] == ["17,897,544", "307,600"]
    assert found["figure"] == ["printed", "ours", "", "remark", "difference"]
    assert found["total"] == ["104 M", "104 M", "104,090,184", "", "+0 M"], "the paper's sum, with the projection"
    assert found["tunable"] == ["18 M", "18 M", "17,897,544", "", "+0 M"]
    assert found["GFLOPs"] == ["348", "505.5", "3 view(s)", "the paper's cannot be derived", "+157.5"]
    for part in (
        "GFLOPs: 168.49 a view, 505.5 a video (3x1 views)\n",
        "(one multiply-add is one operation; norms not counted)",
        "Top-1 printed: k400 82.70",
        "top5 printed: k400 96.2",
        "Note: The printed GFLOPs lie below those of the bare encoder",
    ):
        assert part in ran.out


def test_describe_prints_sizes_means_and_what_wrong_cells_must_be(mdltool: Callable[..., Ran]) -> None:
    out = mdltool("describe", "residual_parallel_early", "--paper").out
    remark = "the paper's cell is wrong: 1.048"
    assert cells(out)["size"] == ["2x", "1.048x", "of one network's convolutions", remark, "-0.952x"]
    assert "mean_top1 printed: 75.32\n" in out
    assert "decathlon_score printed: 2610\n" in out
    out = mdltool("describe", "omi_x3dm_2plus1d_late1").out
    assert "difference" not in cells(out)["figure"], "without --paper"
    assert "mean_top1 printed: 80.29 (must be 80.05)\n" in out


def test_describe_prints_shares_of_the_papers_backbone(mdltool: Callable[..., Ran]) -> None:
    found = cells(mdltool("describe", "cm3t_mpiigi_swinb_mhva_pt", "--paper").out)
    assert found["trained"] == ["12.8 %", "12.77 %", "of 88,000,000", "", "-0.03 %"]
    found = cells(mdltool("describe", "cm3t_mpiigi_swinb_full").out)
    assert found["trained"] == ["100 %", "100.00 %", "of the backbone", ""]


def test_saved_for_backward_is_what_the_regime_needs(mdltool: Callable[..., Ran]) -> None:
    def saved(recipe: str, *changes: str) -> int:
        found: int = describe.run(load(recipe, changes))["saved_for_backward_bytes"]
        return found

    assert saved("tiny_clip_heads") == 128 * 4, "a head's input: 128 features in float32"
    everywhere, last = saved("tiny_clip_mst"), saved("tiny_clip_mst", "adapters.0.layers=4-4")
    whole = saved("tiny_clip_heads", "train.steps.0.regime=full")
    assert 128 * 4 < last < everywhere < whole
    assert saved("tiny_clip_heads", "train.steps.0.regime=full", "data.frames=16") > 1.9 * whole
    line = f"Kept for the backward pass: {everywhere / 2**20:.1f} MiB a clip in float32\n"
    assert line in mdltool("describe", "tiny_clip_mst").out


def test_recipe_list_shows_every_figure_of_a_row(mdltool: Callable[..., Ran]) -> None:
    def published(name: str) -> list[str]:
        lines = mdltool("recipe", "list", "--family", name.partition("_")[0]).out.splitlines()
        first = next(i for i, line in enumerate(lines) if line.startswith(f"│ {name} "))
        rest = [line.split("│") for line in lines[first:]]
        own = [row[-2].strip() for i, row in enumerate(rest) if len(row) > 2 and (i == 0 or not row[1].strip())]
        return own[: next((i for i, row in enumerate(rest[1:], 1) if len(row) < 3 or row[1].strip()), None)]

    assert published("cm3t_ek100_swinb") == [
        "action_top1: ek100 48.2",
        "epochs: ek100 22",
        "%: trained 22.3",
        "GFLOPs: 616",
    ]
    assert published("mst_ssv2_l14_16") == [
        "top-1: ssv2 69.70",
        "top5: ssv2 92.5",
        "M: total 349, tunable 45",
        "GFLOPs: 2232 (3 views)",
    ]
    assert published("residual_parallel_mid")[-4:] == [
        "mean_top1: 76.4",
        "decathlon_score: 2852",
        "size: 2x",
        "must be: size 1.19",
    ]
