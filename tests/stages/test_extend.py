"""compress --extend: a new domain on a compressed model's shared factors (spec residual_adapters 2.5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mdltool.artifact import Artifact, open_artifact
from mdltool.compress.factoring import site_weights
from mdltool.errors import MdlError
from mdltool.model import MultiDomainModel
from mdltool.model_store import load_model
from mdltool.stages import compress, extend
from tests.adapters.test_contract import clip, randomise
from tests.adapters.test_factored import fresh, rebuilt
from tests.conftest import Ran, World
from tests.stages.test_compress import stored

CASES = [("parallel", "resnet26_tiny"), ("st", "clip_vit_tiny"), ("mhva", "clip_vit_tiny")]


def other_domain(model: MultiDomainModel) -> MultiDomainModel:
    """A dense model of the domain c on the same backbone."""
    other = rebuilt(replace(model.spec, domains={"c": 5}))
    torch.manual_seed(11)
    randomise(other)
    return other


def made(adapter: str, backbone: str, tmp_path: Path, independent: bool = False) -> tuple[Artifact, Artifact]:
    model = fresh(adapter, backbone).float()
    amount = compress.Amount(rank=2, independent=independent)
    small = compress.run(stored(model, tmp_path / "m"), amount, tmp_path / "small", work=tmp_path)
    return small, stored(other_domain(model).float(), tmp_path / "other")


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize(("adapter", "backbone"), CASES)
def test_a_domain_is_fitted_and_the_old_ones_stay(
    adapter: str, backbone: str, independent: bool, tmp_path: Path
) -> None:
    small, other = made(adapter, backbone, tmp_path, independent)
    larger = extend.run(small, other, None, tmp_path / "larger", work=tmp_path)
    assert larger.verify() == []
    before, after, dense = (load_model(artifact) for artifact in (small, larger, other))
    assert list(after.spec.domains) == ["a", "b", "c"]
    own = after.tensors()
    assert all(torch.equal(own[key], value) for key, value in before.tensors().items())
    x = clip(before)
    assert torch.equal(after(x, "a"), before(x, "a"))
    assert after(x, "c").shape == (2, 5)
    table = {f"{row['site']}/{row['parameter']}": row for row in larger.load_json("extension.json")["weights"]}
    for weight in site_weights(dense):
        if weight.name not in table:
            continue
        matrix = weight.axes.matrix(dense.tensors()[weight.key("c")]).double()
        shared, private = (own[key].double() for key in weight.keys("c", independent))
        residual = matrix - shared @ private
        assert (shared.mT @ residual).abs().max() < 1e-5 * matrix.abs().max() * shared.abs().max() * 100
        row = table[weight.name]
        assert row["lost"] == pytest.approx(float(residual.detach().square().sum()), rel=1e-4)
        assert row["energy"] == pytest.approx(float(matrix.detach().square().sum()), rel=1e-6)
    assert torch.equal(own["c/head/weight"], dense.tensors()["c/head/weight"])


@pytest.mark.parametrize(("adapter", "backbone"), CASES)
def test_grown_factors_hold_the_new_domain_too(
    adapter: str, backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, other = made(adapter, backbone, tmp_path)
    larger = extend.run(small, other, "c", tmp_path / "larger", work=tmp_path, grow=64)
    before, after, dense = (load_model(artifact).double() for artifact in (small, larger, other))
    x = clip(before).double()
    torch.testing.assert_close(after(x, "c"), dense(x, "c"), rtol=1e-4, atol=1e-4)
    for domain in ("a", "b"):
        torch.testing.assert_close(after(x, domain), before(x, domain), rtol=1e-9, atol=1e-9)
    for key, value in before.tensors().items():
        grown = after.tensors()[key]
        if key.endswith(".private"):
            assert grown[..., value.shape[-2] :, :].abs().sum() == 0
            grown = grown[..., : value.shape[-2], :]
        if "/factors." in key:
            grown = grown[..., : value.shape[-1]]
        assert torch.equal(grown, value), key
    assert "have no room for --grow 64 and take fewer: " in capsys.readouterr().err
    by_one = extend.run(small, other, "c", tmp_path / "one", work=tmp_path, grow=1)
    none = extend.run(small, other, "c", tmp_path / "none", work=tmp_path)
    assert 1e-6 > larger.summary["lost"] < by_one.summary["lost"] < none.summary["lost"]


def test_refusals(tmp_path: Path) -> None:
    small, other = made("parallel", "resnet26_tiny", tmp_path)
    dense = open_artifact(tmp_path / "m")
    elsewhere = other_domain(fresh("parallel", "resnet26_tiny"))
    with torch.no_grad():
        next(elsewhere.backbone.parameters()).add_(1)
    series = stored(other_domain(fresh("series", "resnet26_tiny")), tmp_path / "series")
    cases: list[tuple[Artifact, Artifact, str | None, str]] = [
        (dense, other, None, "not compressed"),
        (small, small, None, "compressed already"),
        (small, series, None, "differ in more"),
        (small, stored(elsewhere.float(), tmp_path / "elsewhere"), None, "another backbone"),
        (small, dense, None, "none of its domains is new"),
        (small, dense, "a", "has a domain 'a' already"),
        (small, other, "d", "no domain 'd'"),
    ]
    for source, model, domain, words in cases:
        with pytest.raises(MdlError, match=words):
            extend.run(source, model, domain, tmp_path / "x", work=tmp_path)
    assert not list(tmp_path.glob("x*"))


def test_the_command(world: World, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    where = ("--work", world.work)
    dense = mdltool(*world.train_words(), "--out", tmp_path / "dense").path
    small = mdltool("compress", dense, "--rank", 2, *where, "--out", tmp_path / "small").path
    fewer = mdltool("model", "rm", "neon", small, *where, "--out", tmp_path / "fewer").path
    ran = mdltool("compress", fewer, "--extend", dense, *where, "--out", tmp_path / "again")
    assert "the shared factors lose" in ran.err
    expected, found = (load_model(open_artifact(path)).tensors() for path in (small, ran.path))
    assert found.keys() == expected.keys()
    for key, value in expected.items():  # the joint SVD's private factors are those of least squares
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5)
    words = ("compress", fewer, "--extend", f"{dense}:neon", "--finetune", 2, "--workers", 0, *where)
    tuned = mdltool(*words, "--out", tmp_path / "tuned").path
    after, before = load_model(open_artifact(tuned)).tensors(), load_model(open_artifact(fewer)).tensors()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    moved = [key for key in found if not torch.equal(found[key], after[key])]
    assert all(key.startswith("neon/") for key in moved)
    assert any(key.endswith(".private") for key in moved)
    for bad, message in (
        (("--extend", dense, "--rank", "0.5"), "settles the ranks"),
        (("--rank", "0.5", "--grow", 2), "does nothing without --extend MODEL"),
    ):
        ran = mdltool("compress", fewer, *bad, *where, "--out", tmp_path / "x")
        assert (ran.code, message in ran.err) == (1, True), ran.err
