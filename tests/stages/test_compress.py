"""compress: the optimum, counts, files, refusals, for every adapter of the table (spec residual_adapters 7)."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mdltool.adapters.factored import FactorSpec, value, weight_of
from mdltool.artifact import Artifact, begin, open_artifact
from mdltool.compress import ranks
from mdltool.compress.factoring import MATRICISE, decompositions, factor_specs, factored, site_weights
from mdltool.compress.ranks import Choice, Weight
from mdltool.counting import count
from mdltool.domain_pack import read_pack
from mdltool.errors import MdlError
from mdltool.model import MultiDomainModel, build_model
from mdltool.model_store import extended, load_model, reduced, write_description
from mdltool.recipe import load
from mdltool.stages import compress, fuse
from mdltool.stages.continuing import finetuning
from mdltool.stages.plan import model_spec, outputs_of
from mdltool.train.checkpoint import save_tensors
from mdltool.train.loop import MetricsLog
from mdltool.types import LabelSpace
from tests.adapters.test_contract import clip
from tests.adapters.test_factored import CASES, fresh, multiplied_out
from tests.conftest import Ran, World
from tests.processes import start

HALF = compress.Amount(rank=0.5)


def stored(model: MultiDomainModel, folder: Path, *more: str) -> Artifact:
    """A model artifact of its own backbone, as train writes it."""
    draft = begin(folder, kind="model", stage="train", inputs=[], request={})
    assert not isinstance(draft, Artifact)
    recipe = load("tiny_demo").model_dump(mode="json")
    recipe["domains"] = {domain: {"task": "single_label"} for domain in model.spec.domains}
    classes = {d: tuple(f"c{i}" for i in range(n)) for d, n in model.spec.domains.items()}
    spaces = {domain: LabelSpace("single_label", names) for domain, names in classes.items()}
    write_description(draft.path, model.spec, recipe, spaces, True, model.parameter_counts())
    for name in ("last", *more):
        save_tensors(draft.path / "weights" / f"{name}.safetensors", model.tensors())
    return draft.commit({"domains": {d: {"classes": len(c)} for d, c in classes.items()}})


def with_factors(model: MultiDomainModel, rank: int | None = None, **options: Any) -> MultiDomainModel:
    """The model with every weight factored, break-even or not; rank: None for all components."""
    weights = site_weights(model)
    tensors = {key: value.detach() for key, value in model.tensors().items()}
    found = decompositions(weights, tensors, list(model.spec.domains), **options)
    choices = {n: Choice(max(p.max_rank for p in e.parts) if rank is None else rank, 1.0) for n, e in found.items()}
    small = build_model(replace(model.spec, factors=factor_specs(found, choices))).double()
    small.load_tensors(factored(tensors, found, choices, "left"), "test")
    return small.eval()


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize(("adapter", "backbone"), CASES)
def test_at_full_rank_the_logits_stay(adapter: str, backbone: str, independent: bool) -> None:
    model = fresh(adapter, backbone)
    small = with_factors(model, independent=independent)
    x = clip(model).double()
    for domain in ("a", "b"):
        torch.testing.assert_close(small(x, domain), model(x, domain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("adapter", "backbone"), CASES)
def test_the_files_hold_the_optimum(adapter: str, backbone: str, tmp_path: Path) -> None:
    """Eckart and Young, from the artifact's factors alone."""
    model = fresh(adapter, backbone)
    source = stored(model, tmp_path / "m", "best")
    made = compress.run(source, compress.Amount(rank=1), tmp_path / "small", work=tmp_path)
    assert made.verify() == []
    before = {key: t.detach().numpy() for key, t in model.tensors().items()}
    table = made.load_json("compression.json")["weights"]
    assert {row["form"] for row in table} == {"shared"}
    for file in ("last", "best"):
        after = {k: t.numpy() for k, t in load_file(made.file(f"weights/{file}.safetensors")).items()}
        for row, weight in zip(table, site_weights(model), strict=True):
            shared, a, b = (
                after[key] for key in (weight.keys("a", False)[0], *(weight.keys(d, False)[1] for d in "ab"))
            )
            dense = [weight.axes.matrix(torch.from_numpy(before[weight.key(d)])).numpy() for d in "ab"]
            sigma = np.linalg.svd(np.concatenate(dense, -1), compute_uv=False)
            lost = sum(float(((m - shared @ p) ** 2).sum()) for m, p in zip(dense, (a, b), strict=True))
            assert lost == pytest.approx(float((sigma[..., 1:] ** 2).sum()), rel=1e-6)
            energy = float((sigma**2).sum())
            assert row["retained"] == pytest.approx(1 - lost / energy, rel=1e-9)
            assert row["rank"] == 1
            assert row["stored"] == shared.size + a.size + b.size
    small = load_model(made).double()
    small.load_tensors(load_file(made.file("weights/last.safetensors")), "test")
    for weight in site_weights(model):
        used = value(weight_of(small.sites[weight.site].adapters["b"], weight.parameter))
        key, private = (small.tensors()[name] for name in weight.keys("b", False))
        assert torch.equal(used, weight.axes.weight(key @ private, weight.shape))
    untouched = [key for key in before if key in small.tensors()]
    assert len(untouched) == len(before) - 2 * len(table)
    assert all(np.array_equal(before[key], small.tensors()[key].detach().numpy()) for key in untouched)


def ranked(recipe: str, rank: float, mode: ranks.RankMode = "per_domain", *changes: str) -> dict[str, int]:
    """Counts of a recipe's compressed model, from shapes alone."""
    loaded = load(recipe, changes)
    spec = model_spec(loaded, outputs_of(loaded))
    with torch.device("meta"):
        model = build_model(spec)
        dense = model.parameter_counts()
        weights = []
        for weight in site_weights(model):
            heads, rows, columns = weight.axes.sizes(weight.shape)
            full = min(rows, len(spec.domains) * columns)
            energies = torch.ones(full, device="cpu")
            batch = math.prod(heads)
            weights.append(Weight(weight.name, rows, columns, len(spec.domains), batch, energies, energies[None]))
        chosen = ranks.by_rank(weights, rank, mode)
        kept = {w.name: chosen[w.name].rank for w in site_weights(model)}
        factors: dict[str, dict[str, FactorSpec]] = {}
        for w in site_weights(model):
            factors.setdefault(w.site, {})[w.parameter] = FactorSpec(kept[w.name] or 0, w.axes)
        assert None not in kept.values()
        counts = build_model(replace(spec, factors=factors)).parameter_counts()
    norms = sum(count([w.statistics]) for w in model.norms.values()) - count(
        [w.inner for w in model.norms.values()]
    )
    filters = sum(p.numel() for p in model.backbone_parameters() if p.ndim > 3)
    # per_domain also holds the domain's own norms
    first = (
        next(iter(counts["per_domain"].values()))["adapters"] - next(iter(dense["per_domain"].values()))["adapters"]
    )
    return {
        "filters": filters,
        "dense": dense["adapters"] - (norms if spec.bn == "per_domain" else 0),
        "stored": counts["adapters"] - (norms if spec.bn == "per_domain" else 0),
        "shared": counts["shared_factors"],
        "private": first,
        "total": counts["total"],
        "whole": counts["backbone"] + counts["heads"] + counts["adapters"],
    }


def test_the_counts_of_the_paper() -> None:
    """Spec residual_adapters 3.1: 2.000, 1.539, 1.559 and 1.533 times the 3x3 filters."""
    found = ranked("residual_parallel", 0.5)
    assert found["filters"] == 5_806_944
    assert found["dense"] == 9 * 645_216 == found["filters"]
    assert (found["stored"], found["shared"]) == (3_128_891, 322_592)
    assert 645_216 + found["private"] == 311_811
    assert found["filters"] + found["stored"] == 8_935_835
    assert found["total"] == found["whole"]
    assert ranked("residual_parallel", 0.5, "stacked")["stored"] == 3_247_871
    half = ranked("residual_parallel_half", 0.5)
    assert (half["filters"] + half["dense"]) / half["filters"] == pytest.approx(1.533, abs=5e-4)


@pytest.mark.parametrize(
    ("kind", "dense", "shared", "conv"),
    [
        ("2d", 1_340_928, 24_768, 696_960),
        ("2plus1d", 1_787_904, 49_536, 945_792),
        ("3d", 4_015_872, 24_768, 2_034_432),
    ],
)
def test_the_counts_of_x3d_adapters(kind: str, dense: int, shared: int, conv: int) -> None:
    found = ranked(f"omi_x3dm_{kind}_all", 0.5)
    assert (found["dense"], found["shared"], found["stored"]) == (dense, shared, conv)


def test_files_and_counts_agree(tmp_path: Path) -> None:
    model = fresh("parallel", "resnet26_tiny").float()
    made = compress.run(stored(model, tmp_path / "m"), HALF, tmp_path / "s", work=tmp_path)
    tensors = load_file(made.file("weights/last.safetensors"))
    counts = made.load_json("model.json")["parameters"]
    numbers = {d: sum(t.numel() for k, t in tensors.items() if k.startswith(f"{d}/")) for d in ("a", "b", "shared")}
    for domain in ("a", "b"):
        own = counts["per_domain"][domain]
        assert numbers[domain] == own["adapters"] + own["head"]
    assert numbers["shared"] == counts["shared_factors"]
    table = made.load_json("compression.json")["weights"]
    found = made.summary["compressed"]
    assert found["stored"] == sum(row["stored"] for row in table)
    assert counts["adapters"] == found["stored"]  # parallel adapters are matrices alone
    file = made.file("weights/last.safetensors")
    with file.open("rb") as handle:
        header = 8 + int.from_bytes(handle.read(8), "little")
    backbone = sum(t.nbytes for k, t in tensors.items() if k.startswith("backbone/"))
    own = sum(part["adapters"] + part["head"] for part in counts["per_domain"].values())
    assert file.stat().st_size - header == 4 * (own + counts["shared_factors"]) + backbone


@pytest.mark.parametrize("independent", [False, True])
def test_domains_come_and_go(independent: bool) -> None:
    small = with_factors(fresh("2plus1d", "x3d_tiny"), rank=3, independent=independent)
    before = {key: t.detach().clone() for key, t in small.tensors().items()}
    x = clip(small).double()
    expected = small(x, "a")
    fewer = reduced(small, "b").double()
    fewer.load_tensors({k: v for k, v in before.items() if not k.startswith("b/")}, "test")
    assert torch.equal(fewer(x, "a"), expected)
    torch.manual_seed(0)
    more = extended(small, "c", 5).double()
    assert all(torch.equal(more.tensors()[key], value.float().double()) for key, value in before.items())
    assert more(x, "c").shape == (2, 5)
    assert more.tensors()["c/stage1/kernel.0.weight.private"].abs().sum() > 0


def test_a_new_domain_starts_as_a_fresh_one_as_far_as_the_shared_factor_spans() -> None:
    small = with_factors(fresh("parallel", "resnet26_tiny"))
    larger = extended(small, "c", 2)
    whole = [w.adapters["c"].matrix.weight for w in larger.sites.values()]
    whole = [weight for weight in whole if weight.factors()[0].shape[-1] == weight.shape[0] > 16]
    assert whole
    for weight in whole:  # he: of all that is spanned nothing is lost
        assert float(weight().detach().std()) == pytest.approx(math.sqrt(2 / weight.shape[0]), rel=0.1)
    zero = with_factors(fresh("lora", "clip_vit_tiny"), rank=2)
    x = clip(zero).double()
    bare = build_model(replace(zero.spec, adapters=[], factors={})).double().eval()
    larger = extended(zero, "c", 3).double()
    assert all(
        (t == 0).all() for k, t in larger.tensors().items() if k.startswith("c/") and k.endswith("up.private")
    )
    bare.heads["a"].load_state_dict({k: v[:3] for k, v in larger.heads["c"].state_dict().items()})
    bare.load_tensors(
        {k: larger.tensors().get(k, v) if k.startswith("backbone/") else v for k, v in bare.tensors().items()}, "t"
    )
    torch.testing.assert_close(larger(x, "c"), bare(x, "a"), rtol=0, atol=1e-10)


def test_what_starts_at_zero_can_learn_where_no_factor_is_shared() -> None:
    small = with_factors(fresh("lora", "clip_vit_tiny"), rank=2, independent=True)
    grown = extended(small, "c", 3).tensors()
    added = {key: tensor for key, tensor in grown.items() if key.startswith("c/") and "/up." in key}
    assert {key.rsplit(".", 1)[1] for key in added} == {"basis", "private"}
    for key, tensor in added.items():
        assert (tensor == 0).all() == key.endswith("private")


@pytest.mark.parametrize("change", ["regime=joint", "regime=full", "updates=9", "epochs=1"])
def test_fine_tuning_leaves_the_backbone_and_its_length(change: str, tmp_path: Path) -> None:
    source = stored(fresh("2d", "x3d_tiny"), tmp_path / "m")
    recipe = source.load_json("model.json")["recipe"]
    with pytest.raises(MdlError):
        finetuning(recipe, 5, {"a": 8, "b": 8}, [f"train.steps.0.{change}"], source)


def test_how_much_is_kept(tmp_path: Path) -> None:
    source = stored(fresh("parallel", "resnet26_tiny"), tmp_path / "m")
    for number, (amount, holds) in enumerate(
        [
            (compress.Amount(energy=0.9), lambda t: all(row["retained"] >= 0.9 for row in t)),
            (
                compress.Amount(energy=0.9, energy_scope="worst"),
                lambda t: all(min(row["retained_by_domain"].values()) >= 0.9 for row in t),
            ),
            (
                compress.Amount(budget="0.4x"),
                lambda t: sum(r["stored"] for r in t) <= 0.4 * sum(r["dense"] for r in t),
            ),
            (compress.Amount(budget="500", min_rank=0), lambda t: any(row["form"] == "dropped" for row in t)),
            (compress.Amount(rank=2, independent=True), lambda t: {row["form"] for row in t} >= {"independent"}),
        ]
    ):
        made = compress.run(source, amount, tmp_path / f"s{number}", work=tmp_path)
        assert holds(made.load_json("compression.json")["weights"]), amount
        model = load_model(made)
        assert model(clip(model), "a").isfinite().all()
        assert numbers_of_adapters(made) == made.summary["compressed"]["stored"]


def numbers_of_adapters(made: Artifact) -> int:
    """In the file of the last weights."""
    tensors = load_file(made.file("weights/last.safetensors"))
    return sum(t.numel() for k, t in tensors.items() if not k.startswith("backbone/") and "/head/" not in k)


def test_what_is_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = reduced(fresh("parallel", "resnet26_tiny"), "b")
    source = stored(model, tmp_path / "m")
    compress.run(source, compress.Amount(rank=1000), tmp_path / "s", work=tmp_path)
    said = capsys.readouterr().err
    for words in ("nothing is shared", "a rank above what there is", "stay dense"):
        assert words in said


def test_a_compressed_model_is_fused(tmp_path: Path) -> None:
    for adapter, backbone in (("parallel", "resnet26_tiny"), ("lora", "clip_vit_tiny")):
        source = stored(fresh(adapter, backbone), tmp_path / adapter)
        small = compress.run(source, compress.Amount(rank=1), tmp_path / f"{adapter}-small", work=tmp_path)
        fused = fuse.run(small, "b", tmp_path / f"{adapter}-fused", work=tmp_path)
        model, expected = load_model(fused), load_model(small)
        x = clip(model)
        torch.testing.assert_close(model(x, "b"), expected(x, "b"), rtol=1e-4, atol=1e-4)
        assert open_artifact(fuse.undo(fused, tmp_path / f"{adapter}-back").path).load_json("model.json") == (
            small.load_json("model.json")
        )


def test_refusals(tmp_path: Path) -> None:
    source = stored(fresh("parallel", "resnet26_tiny"), tmp_path / "m")
    small = compress.run(source, HALF, tmp_path / "small", work=tmp_path)
    grouped = fresh("parallel", "x3d_tiny")
    bare = build_model(replace(grouped.spec, adapters=[]))
    cases: list[tuple[Artifact, compress.Amount, str]] = [
        (small, HALF, "compressed already"),
        (stored(bare, tmp_path / "bare"), HALF, "it has no adapters"),
        (stored(grouped, tmp_path / "grouped"), HALF, "no matrices"),
        (source, compress.Amount(), "in one way"),
        (source, compress.Amount(rank=0.5, energy=0.5), "in one way"),
        (source, compress.Amount(rank=-1), "no rank"),
        (source, compress.Amount(energy=1.5), "no fraction"),
        (source, compress.Amount(budget="10"), "cannot hold"),
        (source, compress.Amount(budget="ten"), "no budget"),
    ]
    fused = fuse.run(source, "a", tmp_path / "fused", work=tmp_path)
    cases.append((fused, HALF, "is fused"))
    there = set(tmp_path.iterdir())
    for model, amount, words in cases:
        with pytest.raises(MdlError, match=words):
            compress.run(model, amount, tmp_path / "x", work=tmp_path)
    assert set(tmp_path.iterdir()) == there


@pytest.fixture(scope="module")
def trained(world: World, mdltool: Callable[..., Ran], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mdltool(*world.train_words(), "--out", tmp_path_factory.mktemp("dense") / "model").path


def test_fine_tuning_moves_what_is_a_domains_own(
    trained: Path, world: World, mdltool: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ("--work", world.work)
    start = load_model(
        open_artifact(mdltool("compress", trained, "--rank", 2, *where, "--out", tmp_path / "s").path)
    )
    words = ("compress", trained, "--rank", 2, "--finetune", 3, *where)
    words += ("--set", "train.checkpoint_every=1", "--set", "val.every=2", "--workers", 0)
    whole = mdltool(*words, "--out", tmp_path / "whole").path
    tuned = load_model(open_artifact(whole))
    moved = {key for key, value in start.tensors().items() if not torch.equal(value, tuned.tensors()[key])}
    still = {key for key in set(start.tensors()) - moved if not key.startswith("backbone/")}
    assert not [key for key in moved if key.startswith("backbone/") or "/factors." in key]
    assert not [key for key in still if key.endswith((".private", "head/weight", "running_mean"))]
    assert {f"weights/{n}.safetensors" for n in ("last", "best")} <= set(open_artifact(whole).files)

    update = MetricsLog.update

    def stop(self: MetricsLog, number: int, *rest: Any) -> None:
        update(self, number, *rest)
        if number == 1:  # seen in the next update
            signal.raise_signal(signal.SIGUSR1)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "update", stop)
        ran = mdltool(*words, "--out", tmp_path / "parts")
    assert (ran.code, ran.out) == (75, "")
    assert "--resume" in mdltool(*words, "--out", tmp_path / "parts").err
    resumed = load_model(open_artifact(mdltool(*words, "--out", tmp_path / "parts", "--resume").path))
    assert all(torch.equal(value, tuned.tensors()[key]) for key, value in resumed.tensors().items())

    both = mdltool(*words, "--set", "svd.train_shared=true", "--out", tmp_path / "both").path
    after = load_model(open_artifact(both)).tensors()
    assert all(not torch.equal(t, start.tensors()[k]) for k, t in after.items() if "/factors." in k)
    assert all(torch.equal(t, start.tensors()[k]) for k, t in after.items() if k.startswith("backbone/"))


def test_a_compressed_model_is_a_model(
    trained: Path, world: World, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    where = ("--work", world.work)
    ran = mdltool("compress", trained, "--rank", "0.5", *where, "--out", tmp_path / "s", "--json")
    assert ran.json["summary"]["compressed"]["rank"] == 0.5
    assert "stage1" in ran.err
    small = tmp_path / "s"
    metrics = mdltool("eval", small, "--views", "1x1", *where, "--out", tmp_path / "e").path
    assert set(open_artifact(metrics).load_json("metrics.json")["domains"]) == {"chalk", "neon"}
    video = next((world.videos / "chalk" / "val").rglob("*.mp4"))
    assert mdltool("predict", small, video, "--domain", "chalk", *where).code == 0
    assert mdltool("report", metrics, *where, "--out", tmp_path / "r").code == 0
    shown = mdltool("inspect", small)
    assert "kernel.0.weight" in shown.out
    fewer = mdltool("model", "rm", "neon", small, *where, "--out", tmp_path / "f").path
    data = ("--data", f"dusk={_shards(world, mdltool, tmp_path)}", "--set", "train.steps.0.updates=2")
    more = mdltool("add-domain", fewer, *data, *where, "--workers", 0, "--out", tmp_path / "more").path
    old, new = (load_model(open_artifact(path)).tensors() for path in (fewer, more))
    assert all(torch.equal(new[key], value) for key, value in old.items())
    assert "dusk/stage1/kernel.0.weight.private" in new


def _shards(world: World, mdltool: Callable[..., Ran], tmp_path: Path) -> Path:
    words = ["--format", "folder", "--domain", "dusk", "--split", "train", "--out", tmp_path / "dusk"]
    return mdltool("shard", world.videos / "neon" / "train", *words).path


def test_the_command_says_what_is_missing(trained: Path, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    for words, message in (
        ((), "in one way"),
        (("--rank", "0.5", "--energy", "0.9"), "in one way"),
        (("--rank", "half"), "no rank"),
        (("--rank", "0.5", "--set", "svd.scale=up"), "scale"),
        (("--rank", "0.5", "--set", "svd.rank=3"), "svd"),
        (("--rank", "0.5", "--set", "train.seed=3"), "nothing is trained"),
        (("--rank", "0.5", "--rank-mode", "all"), "not known"),
    ):
        ran = mdltool("compress", trained, *words, "--work", tmp_path, "--out", tmp_path / "x")
        assert (ran.code, message in ran.err) == (1, True), (words, ran.err)
    assert not list(tmp_path.iterdir())


def test_domains_of_compressed_models_are_split_and_mounted(mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    small = compress.run(
        stored(fresh("parallel", "resnet26_tiny"), tmp_path / "m"), HALF, tmp_path / "s", work=tmp_path
    )
    file = mdltool("model", "split", "b", small.path, "--work", tmp_path, "--out", tmp_path / "b.safetensors").path
    pack = read_pack(file)
    model = load_model(small)
    x = clip(model)
    expected = model(x, "b")
    alone = reduced(model, "b")
    alone.mount("b", pack)
    assert torch.equal(alone(x, "b"), expected)
    owners = {id(wrapper.adapters["b"].matrix.weight.factors()[0]) for wrapper in alone.sites.values()}
    assert owners == {
        id(factor) for wrapper in alone.sites.values() for factor in wrapper.shared_factors().values()
    }
    more = compress.Amount(rank=1)
    other = compress.run(open_artifact(tmp_path / "m"), more, tmp_path / "o", work=tmp_path)
    with pytest.raises(MdlError):
        reduced(load_model(other), "b").mount("b", pack)


def test_a_sweep_scores_every_rank(
    trained: Path, world: World, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    where = ("--work", world.work, "--workers", 0)
    words = ("compress", trained, "--sweep", "--sweep-ranks", "0.25,2", *where)
    ran = mdltool(*words, "--out", tmp_path / "swept")
    made = open_artifact(ran.path)
    points = made.load_json("sweep.json")["points"]
    assert [point["rank"] for point in points] == [0.25, 2, None]
    assert "is taken" in ran.err
    assert made.summary["compressed"]["rank"] in (0.25, 2)
    for point in points[:-1]:
        amount = compress.Amount(rank=point["rank"])
        alone = compress.run(open_artifact(trained), amount, tmp_path / f"r{point['rank']}", work=world.work)
        assert alone.summary["parameters"]["total"] == point["parameters"]
        assert alone.summary["compressed"]["stored"] == point["adapters"]
        assert set(point["scores"]) == {"chalk", "neon"}
    assert points[-1]["parameters"] == open_artifact(trained).load_json("model.json")["parameters"]["total"]
    table = (made.path / "sweep.csv").read_text().splitlines()
    assert len(table) == 4
    assert table[0].startswith("rank,adapters,parameters,retained,chalk.top1,neon.top1,mean")
    assert (made.path / "sweep.png").read_bytes()[1:4] == b"PNG"
    scored = mdltool("eval", made.path, "--views", "1x1", *where, "--out", tmp_path / "e").path
    page = mdltool("report", scored, "--work", world.work, "--out", tmp_path / "r").path / "report.html"
    assert "before fine-tuning" in page.read_text()
    both = mdltool(*words, "--rank", "2", "--finetune", 2, "--out", tmp_path / "both").path
    assert open_artifact(both).summary["compressed"]["rank"] == 2
    for text in ("big", ""):
        ran = mdltool(*words[:-2], "--sweep-ranks", text, "--out", tmp_path / "x", "--work", world.work)
        assert (ran.code, "no list of ranks" in ran.err) == (1, True)


@pytest.mark.parametrize("matricise", MATRICISE[1:])
def test_other_sides_of_convolutions_are_shared(matricise: str, tmp_path: Path) -> None:
    source = stored(fresh("2d", "x3d_tiny"), tmp_path / "m")
    svd = compress.Svd(matricise=matricise)
    amount = compress.Amount(rank=1 if matricise == "basis" else 2)  # more of two domains saves nothing there
    made = compress.run(source, amount, tmp_path / "s", work=tmp_path, svd=svd)
    small = load_model(made).double()
    small.load_tensors(load_file(made.file("weights/last.safetensors")), "test")
    x = clip(small).double()
    torch.testing.assert_close(small(x, "b"), multiplied_out(small)(x, "b"), rtol=1e-8, atol=1e-8)
    kinds = {row["form"] for row in made.load_json("compression.json")["weights"]}
    assert "shared" in kinds
    assert numbers_of_adapters(made) < numbers_of_adapters(source)


def test_the_scale_moves_no_product(tmp_path: Path) -> None:
    source = stored(fresh("st", "clip_vit_tiny"), tmp_path / "m")
    products: dict[str, torch.Tensor] = {}
    for scale in ("left", "sqrt", "right"):
        svd = compress.Svd(scale=scale, balance="frobenius")
        made = compress.run(source, compress.Amount(rank=2), tmp_path / scale, work=tmp_path, svd=svd)
        tensors = load_file(made.file("weights/last.safetensors"))
        key = next(key for key in tensors if key.endswith("factors.up.weight"))
        site = key.split("/")[1]
        products[scale] = tensors[key] @ tensors[f"b/{site}/up.weight.private"]
        lengths = torch.linalg.vector_norm(tensors[key], dim=0)
        assert torch.allclose(lengths, torch.ones(2).double()) == (scale == "right")
    torch.testing.assert_close(products["left"], products["right"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(products["left"], products["sqrt"], rtol=1e-9, atol=1e-9)


@pytest.mark.full
def test_two_processes_fine_tune_as_one(world: World, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    plain = ("heads.dropout=0.0", "train.steps.0.updates=1", "val.every=0")
    sets = [word for key in plain for word in ("--set", key)]
    dense = mdltool(*world.train_words(), *sets, "--out", tmp_path / "dense").path
    words = ["compress", dense, "--rank", 2, "--finetune", 3, "--workers", 0, "--work", world.work]
    # Under AdamW rounding alone would move biases before a BatchNorm, whose gradient is zero, by the whole rate.
    for key in ("train.sync_bn=true", "val.every=0", "train.steps.0.optimizer={name: sgd, lr: 0.01}"):
        words.extend(("--set", key))
    one = mdltool(*words, "--out", tmp_path / "one").path
    processes = start(2, "mdltool", *words, "--out", tmp_path / "two")
    ended = [(*process.communicate(timeout=120), process.returncode) for process in processes]
    assert [code for *_, code in ended] == [0, 0], ended
    before = mdltool("compress", dense, "--rank", 2, "--work", world.work, "--out", tmp_path / "s").path
    start_of = load_model(open_artifact(before)).tensors()
    ours, theirs = (load_model(open_artifact(tmp_path / name)).tensors() for name in ("two", "one"))
    for key, expected in theirs.items():
        torch.testing.assert_close(ours[key], expected, rtol=1e-3, atol=1e-5, msg=key)
    assert open_artifact(one).summary["parameters"] == open_artifact(tmp_path / "two").summary["parameters"]
    moved = {key for key, tensor in start_of.items() if not torch.equal(tensor, ours[key])}
    assert {key for key in ours if key.endswith((".private", "head/weight"))} <= moved
