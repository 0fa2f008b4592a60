"""Counts and GFLOPs of the recipes of MST-Adapter and CM3T (spec mst_adapter 1, 3.1, 4; cm3t 1, 3.2, 4)."""

from __future__ import annotations

import functools
import itertools
import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mdltool.counting import parts
from mdltool.data.features import DEFAULTS, EXTRACTORS
from mdltool.data.features.flow import FlowGrid
from mdltool.data.features.log_mel import LogMel
from mdltool.model import build_model
from mdltool.model_spec import AdapterSpec, ModelSpec
from mdltool.recipe import find, load, shipped
from mdltool.stages import describe
from tests.conftest import Ran
from tests.figures import check_remarks

B16, L14, SWIN, VIVIT, VIT = 85_799_424, 303_179_776, 87_638_984, 88_646_400, 85_798_656
MST_B, MST_L = 17_897_544, 45_244_560
MHVA_PT_SWIN, MHVA_PT_VIT, ST, ST2 = 11_236_656, 8_603_928, 7_110_144, 14_220_288


def _mst_rows() -> dict[str, tuple[int, int]]:
    rows = {}
    for data in ("k400", "ssv2"):
        for frames in (8, 16):
            rows[f"mst_{data}_b16_{frames}"] = (B16, MST_B)
            rows[f"mst_{data}_l14_{frames}"] = (L14, MST_L)
            rows[f"mst_{data}_b16_{frames}_stadapter"] = (B16, ST if data == "k400" else ST2)
        base = f"mst_{data}_b16_8_"
        rows[base + "full"] = (B16, 0)
        for row in ("noshift", "posa", "posb", "posc"):
            rows[base + row] = (B16, MST_B)
        for row in ("1_4", "5_8", "9_12"):
            rows[base + "layers_" + row] = (B16, 5_965_848)
        for row in ("1_8", "5_12"):
            rows[base + "layers_" + row] = (B16, 11_931_696)
        rows[base + "nopw"] = (B16, 14_349_384)
        rows[base + "avg"] = (B16, MST_B - 72)
        rows[base + "avg_nopw"] = (B16, 14_349_312)
    return rows


CM3T_ROWS = {
    "cm3t_ek100_swinb_mhva_pt": (SWIN, MHVA_PT_SWIN),
    "cm3t_ek100_swinb_adaptformer_pt": (SWIN, 1_914_648),
    "cm3t_ek100_swinb_full": (SWIN, 0),
    "cm3t_ek100_clipb_mhva_pt": (B16, MHVA_PT_VIT),
    "cm3t_ek100_vivitb_full": (VIVIT, 0),
    "cm3t_ek100_vivitb_mhva_pt": (VIVIT, MHVA_PT_VIT),
    "cm3t_ek100_vitb_stadapter": (VIT, ST),
    "cm3t_ek100_clipb_stadapter": (B16, ST),
    **{f"cm3t_{data}_swinb_mhva_pt": (SWIN, MHVA_PT_SWIN) for data in ("udiva", "mpiigi")},
    **{f"cm3t_{data}_swinb_full": (SWIN, 0) for data in ("udiva", "mpiigi")},
    **{f"cm3t_{data}_clipb_mhva_pt": (B16, MHVA_PT_VIT) for data in ("udiva", "mpiigi")},
    **{f"cm3t_{data}_clipb_stadapter": (B16, ST) for data in ("udiva", "mpiigi")},
    "cm3t_ek100_swinb": (SWIN, 19_626_800),
    "cm3t_ek100_swinb_mmca": (SWIN, 19_990_064),
    "cm3t_ek100_swinb_full_caa": (SWIN, MHVA_PT_SWIN + 8_390_144),
    "cm3t_ek100_clipb": (B16, 13_540_632),
    "cm3t_ek100_vivitb": (VIVIT, 13_540_632),
    **{f"cm3t_{data}_swinb": (SWIN, 25_405_232) for data in ("udiva", "mpiigi")},
    **{f"cm3t_{data}_swinb_full_caa": (SWIN, MHVA_PT_SWIN + 14_168_576) for data in ("udiva", "mpiigi")},
    **{f"cm3t_{data}_clipb": (B16, 16_692_504) for data in ("udiva", "mpiigi")},
}
TRAINED_WITH_CAA = {"ek100": 96_390_144, "udiva": 102_168_576, "mpiigi": 102_168_576}
ROWS = _mst_rows() | CM3T_ROWS
# spec mst_adapter 4 and cm3t 4, per view
GFLOPS = {
    "mst_k400_b16_8_full": 140.50,
    "mst_k400_b16_8": 168.61,
    "mst_k400_b16_16": 337.22,
    "mst_k400_l14_8": 740.83,
    "mst_k400_l14_16": 1481.65,
    "mst_k400_b16_8_stadapter": 454.9 / 3,
    "mst_k400_b16_16_stadapter": 909.7 / 3,
    "mst_ssv2_b16_16_stadapter": 976.4 / 3,
    "cm3t_ek100_swinb_full": 281.33,
    "cm3t_ek100_swinb_adaptformer_pt": 291.11,
    "cm3t_ek100_swinb_mhva_pt": 291.11,
    "cm3t_ek100_clipb_mhva_pt": 143.66,
    "cm3t_ek100_vivitb_full": 451.52,
    "cm3t_ek100_vivitb_mhva_pt": 457.4,
    "cm3t_ek100_vitb_stadapter": 303.2,
    "cm3t_ek100_swinb": 304.19,
    "cm3t_ek100_clipb": 147.47,
    "cm3t_ek100_vivitb": 464.8,
}


VARIANTS_OF = "cm3t_ek100_swinb_mhva_pt"
PREFIXES, CHANNELS, BLOCKS = 360_984, 12_032, 24  # of Swin-B: the prefixes' parameters, its blocks and their widths


def _variants() -> dict[tuple[str, ...], int]:
    """What the recipe's file says in comments: the values of --set, and the adapters' parameters with them."""
    lines = re.findall(r"^#   (--set .+?)  +([\d,]+)", find(VARIANTS_OF).read_text(), re.MULTILINE)
    split = ((shlex.split(words), number) for words, number in lines)
    return {tuple(w for w in words if w != "--set"): int(number.replace(",", "")) for words, number in split}


def _variants_by_formula() -> dict[tuple[str, ...], int]:
    """Spec cm3t 1, of the formulas in 2.2, 2.3 and 3.3."""
    found = {
        ("adapters.0.scale=fixed",): MHVA_PT_SWIN - BLOCKS,
        ("adapters.1.reparam=mlp_tanh", "adapters.1.dropout=0.3"): (
            MHVA_PT_SWIN + 64 * (2 * CHANNELS + BLOCKS) + CHANNELS  # C -> 64 -> C with biases, 1.55 M
        ),
        ("adapters=[{type: prefix, length: 30}]",): PREFIXES,
    }
    for heads, r in itertools.product((1, 7), (32, 64, 128, 256)):
        if (heads, r) != (7, 64):
            mhva = heads * (2 * CHANNELS * r + BLOCKS * r + CHANNELS) + BLOCKS
            found[f"adapters.0.r={r}", f"adapters.0.heads={heads}"] = mhva + PREFIXES
    return found


@functools.cache
def counts(name: str, *changes: str) -> dict[str, int]:
    recipe = load(name, changes)
    with torch.device("meta"):
        return parts(build_model(describe.model_spec(recipe, describe.outputs_of(recipe))))


@functools.cache
def view(name: str) -> float:
    """GFLOPs of one view."""
    recipe = load(name)
    spec = describe.model_spec(recipe, describe.outputs_of(recipe))
    with torch.device("meta"):
        model = build_model(spec)
    return describe.gflops_per_view(model, spec)


def test_every_recipe_of_the_papers_has_its_row_here() -> None:
    assert set(ROWS) == {name for name in shipped() if name.startswith(("mst_", "cm3t_"))}


@pytest.mark.parametrize("name", ROWS)
def test_exact_integers(name: str) -> None:
    found = counts(name)
    assert (found["backbone"], found["adapters"]) == ROWS[name]


def test_the_variants_in_a_recipes_comments_are_all_those_of_the_text() -> None:
    found = _variants()
    assert found == _variants_by_formula()
    assert found["adapters.0.r=64", "adapters.0.heads=1"] == 1_914_672  # printed in spec 3.2


@pytest.mark.parametrize("sets", _variants(), ids=" ".join)
def test_a_variant_is_valid_and_has_its_parameters(sets: tuple[str, ...]) -> None:
    assert counts(VARIANTS_OF, *sets)["adapters"] == _variants()[sets]


@pytest.mark.parametrize("name", GFLOPS)
def test_gflops(name: str) -> None:
    """Within half a percent of the specifications' own counts."""
    assert view(name) == pytest.approx(GFLOPS[name], rel=0.005)


@pytest.mark.parametrize("name", ROWS)
def test_every_printed_figure_matches_or_says_why_not(name: str) -> None:
    """Sizes match as they are rounded, but for the SSv2 model of ST-Adapter (spec mst_adapter 8)."""
    source = load(name).published
    own = name if name in GFLOPS else name.replace("ssv2", "k400")  # that network is counted already
    found = describe.published(load(name), counts(name), view(own) if source.gflops else 0.0)
    figures = check_remarks(name, found)
    wrong = {figure for figure, entry in figures.items() if not entry["matches"]} - {"gflops"}
    assert wrong == ({"total", "tunable"} if name == "mst_ssv2_b16_16_stadapter" else set())


def test_the_trained_shares_of_88_million() -> None:
    """Spec cm3t 1 and 3.2."""
    shares = {name: load(name).published.percent for name in CM3T_ROWS}
    printed = {name for name, cells in shares.items() if cells}
    assert len(printed) == 13
    for name in (name for name in printed if name.endswith("_full_caa")):
        ours = describe.published(load(name), counts(name), 0.0)["percent"]["trained"]["ours"]
        assert round(ours * 880_000) == TRAINED_WITH_CAA[name.split("_")[1]]


def test_a_stream_costs_what_the_paper_says_a_modality_does() -> None:
    ek, udiva = counts("cm3t_ek100_swinb")["adapters"], counts("cm3t_udiva_swinb")["adapters"]
    assert udiva - ek == 5_778_432, "two streams, printed as 5.8M"


def test_embedders_of_our_extractors_tokens_are_counted_apart() -> None:
    """A LayerNorm and a linear layer for each stream that is not 512 wide as it is stored."""
    flow, audio = (2 * width + width * 512 + 512 for width in (FlowGrid().width, LogMel().width))
    assert counts("cm3t_ek100_swinb")["streams"] == flow + audio
    assert counts("cm3t_mpiigi_swinb")["streams"] == 4 * audio
    assert counts("cm3t_udiva_swinb")["streams"] == 2 * audio, "text is 512 wide"
    stored = [f"streams.{name}={{kind: {name}, width: 512}}" for name in ("flow", "audio")]
    found = describe.run(load("cm3t_ek100_swinb", stored))["parameters"]
    assert (found["adapters"], found["streams"]) == (counts("cm3t_ek100_swinb")["adapters"], 0)


def test_recipes_take_the_tokens_of_the_default_extractors() -> None:
    widths = {kind: EXTRACTORS.load(name, "streams")().width for kind, name in DEFAULTS.items()}
    parts = [part for name in CM3T_ROWS for part in load(name).streams.values()]
    assert {part.kind for part in parts} == set(widths)
    assert all((part.input or part.width) == widths[part.kind] for part in parts)


def test_ours_is_summed_as_the_paper_sums_and_else_has_the_heads() -> None:
    head, projection = 769 * 400, 768 * 512
    found = describe.parameters(load("mst_k400_b16_8"))
    assert found == {"total": B16 + MST_B + projection, "tunable": MST_B, "adapters": MST_B}
    found = describe.parameters(load("mst_k400_b16_8_full"))
    assert found == {"total": B16 + projection, "tunable": B16 + projection, "adapters": 0}
    assert describe.parameters(load("mst_k400_b16_8_nopw")) == {
        "adapters": 14_349_384,
        "total": B16 + 14_349_384 + head,
    }
    assert list(describe.parameters(load("tiny_single"))) == ["adapters"], "its data say how many classes there are"


def test_recipe_list_shows_ours_beside_the_published_parameters(mdltool: Callable[..., Ran]) -> None:
    rows = {
        row["name"]: row
        for row in mdltool("recipe", "list", "--family", "residual", "--ours", "--json").json["recipes"]
    }
    assert set(rows) == {name for name in shipped() if name.startswith("residual_")}
    for name, row in rows.items():
        found = counts(name)
        assert row["ours"] == {part: found[part] for part in ("adapters", "total")}
    shown = mdltool("recipe", "list", "--family", "tiny", "--ours")
    assert "ours, M" in shown.out
    total = describe.run(load("tiny_demo"))["parameters"]["total"]
    assert f"total {total / 1e6:.2f}" in next(line for line in shown.out.splitlines() if "tiny_demo" in line)
    assert "ours" not in mdltool("recipe", "list", "--family", "tiny").out
    ran = mdltool("recipe", "list", "--ours", "--published")
    assert ran.code == 1
    assert "do not go together" in ran.err


def adapters(backbone: str, frames: int, *entries: tuple[str, dict[str, Any]]) -> int:
    parts = [AdapterSpec(kind, "all", options) for kind, options in entries]
    spec = ModelSpec(backbone, {}, frames, 224, {"a": 1}, parts, bn="frozen")
    with torch.device("meta"):
        found: int = build_model(spec).parameter_counts()["adapters"]
    return found


@pytest.mark.parametrize(
    ("options", "b16", "l14"),
    [
        ({"r": 256}, 11.15, 28.61),
        ({"r": 320}, 14.43, 36.73),
        ({"r": 448}, 21.57, 54.15),
        ({"r": 512}, 25.43, 63.46),
        ({"kernels": "t135"}, 17.84, 45.13),
        ({"kernels": "mixed17"}, 17.92, 45.28),
        ({"kernels": "mixed31"}, 18.05, 45.54),
        ({"kernels": "mixed39"}, 18.12, 45.69),
        ({"kernels": "cube135"}, 19.17, 47.79),
        ({"kernels": "cube357"}, 22.32, 54.09),
        ({"fusion": "softmax"}, 17.90, 45.24),
    ],
)
def test_widths_and_kernels_of_the_count_table(options: dict[str, Any], b16: float, l14: float) -> None:
    """Spec mst_adapter 3.1."""
    assert round(adapters("clip_vit_b16", 8, ("mst", options)) / 1e6, 2) == b16
    assert round(adapters("clip_vit_l14", 8, ("mst", options)) / 1e6, 2) == l14


def test_the_parts_of_the_counts() -> None:
    dense = adapters("clip_vit_b16", 8, ("mst", {}))
    assert dense - adapters("clip_vit_b16", 8, ("mst", {"fusion": "average"})) == 72
    assert dense - adapters("clip_vit_b16", 8, ("mst", {"pointwise": "none"})) == 3_548_160
    large = adapters("clip_vit_l14", 8, ("mst", {}))
    assert large - adapters("clip_vit_l14", 8, ("mst", {"fusion": "average"})) == 144
    assert large - adapters("clip_vit_l14", 8, ("mst", {"pointwise": "none"})) == 7_096_320
    assert adapters("swin3d_b", 32, ("mst", {})) == 25_951_888
    assert adapters("vivit_b", 32, ("mst", {})) == MST_B
    assert adapters("swin3d_b", 32, ("mhva", {"scale": "fixed"})) == 10_875_648
    assert adapters("swin3d_b", 32, ("prefix", {})) == 360_960 + 24
    assert adapters("swin3d_b", 32, ("mhva", {"heads": 1}), ("prefix", {})) == 1_914_672
    assert adapters("clip_vit_l14", 8, ("mhva", {}), ("prefix", {})) == 22_940_208
    windows = ("mhva", {"heads": 8, "chunk": "windows"})  # 8 heads capped by the windows of a clip: 8, 8, 8, 2
    assert adapters("swin3d_b", 32, windows, ("prefix", {"length": 32})) == 11_228_464
    assert adapters("swin3d_b", 32, windows, ("prefix", {})) == 11_204_400
