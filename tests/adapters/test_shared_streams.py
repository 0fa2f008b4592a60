"""Cross-attention that domains share, domains that come and go, and compression of domains with other streams."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from mdltool.compress.factoring import decompositions, factor_specs, factored, site_weights
from mdltool.compress.ranks import Choice
from mdltool.counting import count
from mdltool.domain_pack import DomainPack, model_form
from mdltool.errors import MdlError
from mdltool.model import MultiDomainModel, build_model
from mdltool.model_spec import ModelSpec
from mdltool.model_store import extended, grown, reduced
from mdltool.recipe import load
from mdltool.schema import Recipe
from mdltool.stages.begin_streams import begin_streams
from mdltool.stages.modalities import Addition, spec_with
from mdltool.types import LabelSpace
from mdltool.wrapping import TokenGrid
from tests.adapters.streams import AUDIO, BOTH, FLOW, both, clips, stream_model, stream_spec, tokens

EMBEDDED = {name: replace(spec, embedder="linear") for name, spec in BOTH.items()}


def shared(**changes: Any) -> MultiDomainModel:
    """a reads both streams, b one of them, with common weights."""
    spec = stream_spec(streams={"a": EMBEDDED, "b": {"flow": EMBEDDED["flow"]}}, share=["a", "b"], **changes)
    return stream_model(spec).float()


def packed(model: MultiDomainModel, domain: str) -> DomainPack:
    own = {k.removeprefix(f"{domain}/"): t for k, t in model.tensors(False).items() if k.startswith(f"{domain}/")}
    outputs = model.spec.domains[domain]
    return DomainPack(
        domain=domain,
        space=LabelSpace("single_label", tuple(map(str, range(outputs)))),
        outputs=outputs,
        model=model_form(model.spec),
        **model.digests(),
        recipe={"domain": {}},
        streams=model.spec.streams.get(domain, {}),
        tensors=own,
    )


def small(model: MultiDomainModel) -> MultiDomainModel:
    """The model with every factor at its full rank."""
    found = decompositions(site_weights(model), model.tensors(), list(model.spec.domains))
    full = {name: Choice(max(part.max_rank for part in entry.parts), 1.0) for name, entry in found.items()}
    made = build_model(replace(model.spec, factors=factor_specs(found, full))).double().eval()
    made.load_tensors(factored(model.tensors(), found, full, "left"), "test")
    return made


def test_domains_share_one_set_that_is_stored_and_counted_once() -> None:
    model, x, given = shared(), clips(stream_spec()).float(), both(2, 1, 3)
    alone = stream_model(
        replace(model.spec, adapters=[*model.spec.adapters[:2], stream_spec().adapters[2]])
    ).float()
    keys = {key for key in model.tensors() if "caa" in key or "/streams/" in key}
    assert keys
    assert all(key.startswith("shared/") for key in keys)
    own = {key: t for key, t in alone.tensors().items() if key.startswith("a/") and "+caa" in key}
    assert sum(t.numel() for k, t in model.tensors().items() if "+caa" in k) == sum(t.numel() for t in own.values())
    assert model.parameter_counts()["streams"] == count([model.embedders]) < count([alone.embedders])
    common = sum(count([w.common]) for w in model.sites.values() if w.common is not None)
    assert model.parameter_counts()["adapters"] == common + sum(
        entry["adapters"] for entry in model.parameter_counts()["per_domain"].values()
    )
    state = model.tensors()  # each domain with the common weights as its own
    theirs = {k: state.get(k, state.get("shared/" + k.split("/", 1)[1])) for k in alone.tensors()}
    alone.load_tensors({key: tensor for key, tensor in theirs.items() if tensor is not None}, "test")
    for domain, streams in (("a", given), ("b", {"flow": given["flow"]})):
        assert torch.equal(model(x, domain, streams), alone(x, domain, streams))
        assert torch.equal(copy.deepcopy(model)(x, domain, streams), model(x, domain, streams))
    mixed = model(x, ["b", "a", "b"], given)
    torch.testing.assert_close(mixed[1], model(x, "a", given)[1], rtol=0, atol=1e-5)


def test_shared_weights_train_with_any_domain_but_not_for_one_alone() -> None:
    model = shared()
    trains = {key for key, t in model.tensors().items() if t.requires_grad}
    assert any(key.startswith("shared/") for key in trains)
    model.apply_regime("frozen", "frozen", only=("a/",))
    assert all(key.startswith("a/") for key, t in model.tensors().items() if t.requires_grad)


def test_a_sharing_domain_goes_and_comes_back_under_its_name() -> None:
    model, x, given = shared(), clips(stream_spec()).float(), both(2, 1, 3)
    expected, pack = model(x, "a", given), packed(model, "a")
    digest = model.digests()["shared"]
    for smaller in (reduced(model, "a"), copy.deepcopy(model)):
        if "a" in smaller.spec.domains:
            smaller.unmount("a")
        assert smaller.digests()["shared"] == digest, "the common weights stay, those of streams that b has not too"
        with pytest.raises(MdlError, match="keep its name"):
            smaller.mount("c", pack)
        smaller.mount("a", pack)
        assert torch.equal(smaller(x, "a", given), expected)
        again = build_model(ModelSpec.from_json(smaller.spec.to_json())).eval()
        again.load_tensors(smaller.tensors(), "test")
        assert torch.equal(again(x, "a", given), expected)


def test_a_domain_takes_its_streams_along() -> None:
    spec = stream_spec(streams={"a": EMBEDDED, "b": {"flow": EMBEDDED["flow"]}})
    model, x, given = stream_model(spec).float(), clips(spec).float(), both(2, 1, 3)
    expected, pack = model(x, "a", given), packed(model, "a")
    smaller = reduced(model, "a")
    assert set(smaller.spec.streams) == {"b"}
    smaller.mount("c", pack)
    assert torch.equal(smaller(x, "c", given), expected)
    assert packed(smaller, "c").streams == pack.streams
    smaller.unmount("c")
    assert "c" not in smaller.spec.streams
    with pytest.raises(MdlError, match="'flow' has width"):
        smaller.mount("c", replace(pack, streams={"flow": replace(FLOW, width=5, input=5)}))
    assert packed(stream_model(stream_spec(streams={})), "a").header().get("streams") is None


def test_a_new_domain_begins_fresh_or_as_another() -> None:
    model, x = stream_model(stream_spec()).float(), clips(stream_spec()).float()
    fresh = extended(model, "c", 3, streams={"audio": AUDIO})
    assert torch.equal(fresh(x, "c", {"audio": tokens(1, 2, 3)}), fresh(x, "c"))
    copied = extended(model, "c", 3, "a", streams=BOTH)
    copied.heads["c"].load_state_dict(copied.heads["a"].state_dict())
    assert torch.equal(copied(x, "c", both(1, 2, 3)), model(x, "a", both(1, 2, 3)))


@pytest.mark.parametrize("independent", [False, True])
def test_compression_factors_what_every_domain_has(independent: bool) -> None:
    spec = stream_spec(streams={"a": BOTH, "b": {"flow": FLOW}})
    model, x = stream_model(spec), clips(spec)
    weights = site_weights(model)
    ours = {weight.parameter for weight in weights if weight.site == "block3.mlp+caa"}
    fusion = {f"fusion.{part}.weight" for part in "qkv"}
    assert ours == {"out.weight", "streams.flow.key.weight", "streams.flow.value.weight"} | fusion
    found = decompositions(weights, model.tensors(), ["a", "b"], independent=independent)
    full = {name: Choice(max(part.max_rank for part in entry.parts), 1.0) for name, entry in found.items()}
    small = build_model(replace(spec, factors=factor_specs(found, full))).double().eval()
    small.load_tensors(factored(model.tensors(), found, full, "left"), "test")
    for domain, given in (("a", both(2, 0, 3)), ("b", {"flow": tokens(2, 1, 0)})):
        torch.testing.assert_close(small(x, domain, given), model(x, domain, given), rtol=0, atol=1e-8)
    without = extended(small, "c", 3, streams={"audio": AUDIO}).double()  # lacks a factored weight
    assert without(x, "c", {"audio": tokens(1, 1, 1)}).shape == (3, 3)


def test_a_name_that_another_begins_with_trains_alone() -> None:
    two = {"audio": AUDIO, "audio2": replace(AUDIO, late=True)}
    old = stream_model(stream_spec(streams={"a": {"audio": AUDIO, "audio2": two["audio2"]}}))
    larger = {**two, "audio3": replace(AUDIO, late=True), "audi": replace(AUDIO, late=True)}
    new = grown(old, replace(old.spec, streams={"a": larger}))
    added = {key for key in new.tensors() if key not in old.tensors()}
    assert any(key.endswith("gains.audi") for key in added)
    new.apply_regime("adapters", "frozen", only=tuple(added), adapters=["caa"])
    assert {key for key, tensor in new.tensors().items() if tensor.requires_grad} == added


def test_a_stream_is_the_same_in_all_domains_that_share() -> None:
    late = {"b": {"audio": replace(AUDIO, late=True)}, "a": {"audio": AUDIO}}
    with pytest.raises(MdlError, match="'audio' has late True in the domain b and False in a"):
        build_model(stream_spec(streams=late, share=["a", "b"]))
    build_model(stream_spec(streams=late))


@pytest.mark.parametrize("end_to_end", [False, True])
def test_a_stream_comes_to_another_domain_as_it_is_in_the_shared_weights(end_to_end: bool) -> None:
    old = stream_model(stream_spec(streams={"a": {"audio": AUDIO}}, share=["a", "b"]))
    recipe = load("cm3t_ek100").model_dump(mode="json")
    part = {**recipe["streams"]["audio"], "width": 12}
    recipe |= {"domains": {name: {} for name in "ab"}, "streams": {"audio": part, "text": part | {"kind": "text"}}}
    new = Recipe.model_validate(recipe)
    spec = spec_with(old.spec, Addition({"b": ["audio", "text"]}, new, new), late=not end_to_end)
    assert spec.streams["a"] == {"audio": AUDIO}
    assert {name: entry.late for name, entry in spec.streams["b"].items()} == {
        "audio": False,
        "text": not end_to_end,
    }
    x, given, larger = clips(old.spec), {"audio": tokens(2, 1, 0)}, grown(old, spec).double()
    larger.load_tensors({**larger.tensors(), **old.tensors()}, "test")
    assert torch.equal(larger(x, "a", given), old(x, "a", given))
    assert not torch.equal(larger(x, "b", given), old(x, "b"))


def test_the_only_domain_with_streams_leaves_a_compressed_model() -> None:
    model = small(stream_model(replace(stream_spec(streams={"a": {"audio": AUDIO}}), domains={"a": 3})))
    both_domains = extended(model, "b", 4)
    smaller, x = reduced(both_domains, "a"), clips(model.spec).float()
    assert torch.equal(smaller(x, "b"), both_domains(x, "b"))
    assert not any("caa" in site for site in smaller.spec.factors)
    again = build_model(ModelSpec.from_json(smaller.spec.to_json())).eval()
    again.load_tensors(smaller.tensors(), "test")
    assert torch.equal(again(x, "b"), smaller(x, "b"))


@pytest.mark.parametrize("kind", ["shared", "compressed"])
def test_new_streams_begin_as_those_of_any_model(kind: str) -> None:
    share = {"share": ["a"]} if kind == "shared" else {}
    other = stream_model(stream_spec(streams={"a": {"audio": EMBEDDED["audio"]}}, **share).of(["a"]), seed=5)
    other = small(other) if kind == "compressed" else other
    old = stream_model(stream_spec(streams={}))
    new = grown(old, stream_spec(streams={"b": {"audio": EMBEDDED["audio"]}})).double()
    keys = [key for key in new.tensors() if key not in old.tensors()]
    new.load_tensors({**new.tensors(), **old.tensors()}, "test")
    assert begin_streams(new, keys, other, "a") == len(keys)
    for site, wrapper in other.sites.items():
        if wrapper.reads_streams:
            source: Any = wrapper.common if share else wrapper.adapters["a"]
            begun: Any = new.sites[site].adapters["b"]
            x, given = torch.randn(3, 2, 4, 4, source.out_bias.shape[0]).double(), {"audio": tokens(2, 1, 0)}
            b = torch.randn(3, 2, 4, 4, 6).double()
            grid = TokenGrid(2, 4, 4, "grid")
            torch.testing.assert_close(begun(x, b, grid, given), source(x, b, grid, given), rtol=0, atol=1e-10)
    theirs: Any = other.embedders.common if share else other.embedders.own["a"]
    mine: Any = new.embedders.own["b"]
    assert torch.equal(mine["audio"].proj.weight, theirs["audio"].proj.weight)


def test_new_streams_do_not_begin_with_half_of_a_fusion() -> None:
    """An output without the fusion that it goes with would change what clips get before any training."""
    other = stream_model(stream_spec(streams={"a": {"audio": AUDIO}}, fusion="sum").of(["a"]), seed=5)
    old = stream_model(stream_spec(streams={}))
    new = grown(old, stream_spec(streams={"a": {"audio": AUDIO}})).double()
    keys = [key for key in new.tensors() if key not in old.tensors()]
    new.load_tensors({**new.tensors(), **old.tensors()}, "test")
    assert 0 < begin_streams(new, keys, other, "a") < len(keys)
    x = clips(old.spec)
    assert torch.equal(new(x, "a", {"audio": tokens(2, 1, 0)}), old(x, "a"))
