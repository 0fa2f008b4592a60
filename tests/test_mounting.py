"""Domains on and off a loaded model, and the file format of one: model.mount, model.unmount, domain_pack."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mdltool.adapters.domain_norm import BATCH_NORMS
from mdltool.convolution import PaddedConv3d
from mdltool.domain_pack import DomainPack, content_digest, model_form, read_pack
from mdltool.errors import MdlError
from mdltool.model import MultiDomainModel, build_model
from mdltool.model_spec import ModelSpec
from mdltool.types import LabelSpace
from mdltool.wrapping import library_tensors
from tests.adapters.test_factored import factored
from tests.models import clips, tiny_model, tiny_spec


def packed(model: MultiDomainModel, domain: str) -> DomainPack:
    own = model.tensors(with_backbone=False)
    return DomainPack(
        domain,
        LabelSpace("single_label", tuple(f"class {i}" for i in range(model.spec.domains[domain]))),
        model.spec.domains[domain],
        model_form(model.spec),
        **model.digests(),
        recipe={"views": {}},
        tensors={key.removeprefix(f"{domain}/"): t for key, t in own.items() if key.startswith(f"{domain}/")},
        where="test",
    )


def sibling(model: MultiDomainModel, domain: str, outputs: int, seed: int = 7) -> MultiDomainModel:
    """A model with the same backbone and shared parts and one domain, of random tensors."""
    torch.manual_seed(seed)
    spec = dataclasses.replace(model.spec, domains={domain: outputs})
    other = build_model(spec).double().eval()
    common = {key: t for key, t in model.tensors().items() if key.startswith(("backbone/", "shared/"))}
    own = {key: t for key, t in other.tensors().items() if key.startswith(f"{domain}/")}
    with torch.no_grad():
        for tensor in own.values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    other.load_tensors(common | own, "test")
    return other


MODELS: dict[str, dict[str, Any]] = {
    "per domain": {"bn": "per_domain"},
    "statistics": {"bn": "per_domain_stats", "head": "mlp", "head_hidden": 8},
    "shared": {"bn": "frozen"},
    "residual": {"adapter": "series", "backbone": "resnet26_tiny", "num_frames": 1, "bn": "per_domain"},
    "prefix": {"adapter": "prefix", "options": {"gate": "softmax"}, "backbone": "vivit_tiny", "bn": "frozen"},
    "no parameters": {"adapter": "cls_shift", "backbone": "clip_vit_tiny", "bn": "frozen"},
    "heads": {"adapter": None, "bn": "frozen"},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_mounted_domain_is_what_it_was(name: str, tmp_path: Path) -> None:
    """Under the same names and another one, bit for bit, beside the others or alone in a mixed batch."""
    model = tiny_model(**MODELS[name])
    donor = sibling(model, "new", 5)
    (tmp_path / "new.safetensors").write_bytes(packed(donor, "new").to_bytes())
    x = clips(3, model.spec.num_frames)
    before = {key: (tensor, tensor.clone(), tensor._version) for key, tensor in model.tensors().items()}
    old, expected = model(x, "a"), donor(x, "new")
    pack = read_pack(tmp_path / "new.safetensors", verify=True)
    state = torch.get_rng_state()
    model.mount("fresh", pack)
    assert torch.equal(torch.get_rng_state(), state), "nothing was drawn"
    assert torch.equal(model(x, "fresh"), expected)
    assert torch.equal(model(x, "a"), old)
    torch.testing.assert_close(model(x, ["a", "fresh", "a"])[1], expected[1], rtol=1e-12, atol=1e-10)
    after = model.tensors()
    for key, (tensor, value, version) in before.items():
        assert after[key] is tensor, key
        assert after[key]._version == version, key
        assert torch.equal(tensor, value), key
    whole = build_model(model.spec)
    whole.apply_regime("joint", model.spec.bn)
    built = whole.tensors()
    assert list(after) == list(built)
    assert {key: t.shape for key, t in after.items()} == {key: t.shape for key, t in built.items()}
    assert all(isinstance(after[key], nn.Parameter) == isinstance(built[key], nn.Parameter) for key in built)
    assert model.parameter_counts() == whole.parameter_counts()
    assert dataclasses.replace(packed(model, "fresh"), domain="new", where=pack.where).to_bytes() == pack.to_bytes()
    model.unmount("fresh")
    assert list(model.tensors()) == list(before)
    assert list(model.spec.domains) == ["a", "b"]
    assert torch.equal(model(x, "a"), old)


def test_a_model_without_domains_takes_them_one_after_the_other() -> None:
    model = tiny_model(domains=("a",), bn="per_domain")
    x = clips()
    first, other = packed(copy.deepcopy(model), "a"), packed(sibling(model, "b", 4), "b")
    expected = {"a": model(x, "a"), "b": sibling(model, "b", 4)(x, "b")}
    model.unmount("a")
    with pytest.raises(MdlError, match="no domain 'a'"):
        model(x, "a")
    for name, pack in (("b", other), ("a", first), ("b", other)):
        model.mount(name, pack)
        assert torch.equal(model(x, name), expected[name])
        model.unmount(name)


def test_a_mounted_domain_trains_as_any_other() -> None:
    model = tiny_model("3d", bn="per_domain")
    model.train()
    model.mount("new", packed(sibling(model, "new", 3), "new"))
    added = model.sites["stage1"].adapters["new"]
    assert added.training
    assert any(isinstance(module, PaddedConv3d) for module in added.modules())
    model.apply_regime("adapters", "frozen", only=("new/",))
    model(clips(), "new").sum().backward()
    assert {key.split("/")[0] for key, t in model.tensors().items() if t.requires_grad} == {"new"}
    assert added.kernel[0].weight.grad.abs().sum() > 0 if isinstance(added.kernel, nn.Sequential) else True
    twice = packed(sibling(model, "c", 3), "c")
    model.mount("c", twice)
    model.mount("d", twice)
    with torch.no_grad():
        model.sites["stage1"].adapters["new"].norm.weight.fill_(9)
    assert not (model.sites["stage1"].adapters["c"].norm.weight == 9).any(), "domains share no module"


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize(
    ("adapter", "backbone"), [("2plus1d", "x3d_tiny"), ("mhva", "swin3d_tiny"), ("st", "vit_tiny")]
)
def test_a_compressed_domain_needs_the_same_factors(
    adapter: str, backbone: str, independent: bool, tmp_path: Path
) -> None:
    model = factored(adapter, backbone, independent)
    x = clips(2, model.spec.num_frames, model.spec.crop)
    expected = model(x, "a")
    (tmp_path / "a.safetensors").write_bytes(packed(model, "a").to_bytes())
    pack = read_pack(tmp_path / "a.safetensors", verify=True)
    model.mount("c", pack)
    assert torch.equal(model(x, "c"), expected)
    assert list(model.tensors()) == list(build_model(model.spec).tensors())
    model.unmount("a")
    model.mount("a", pack)
    assert torch.equal(model(x, "a"), expected)
    assert torch.equal(copy.deepcopy(model)(x, "c"), expected)
    shared = list(model.shared_tensors().values())
    assert bool(shared) != independent or adapter == "2plus1d", "whose LayerNorms are shared, too"
    with torch.no_grad():
        for tensor in shared:
            tensor.add_(1e-9)
    if shared:
        assert not torch.equal(model(x, "c"), expected), "mounted or not, it follows the shared factors"
        with pytest.raises(MdlError, match="trained on another shared part"):
            model.mount("d", pack)
    dense = dataclasses.replace(model.spec, factors={})
    with pytest.raises(MdlError, match=r"made for another model \(factors"):
        build_model(dense).double().mount("d", pack)


REFUSED = {
    "adapters": ({"options": {"ln": "none"}}, "made for another model .adapters"),
    "bn": ({"bn": "frozen"}, "made for another model .bn"),
    "head": ({"head": "mlp", "head_hidden": 4}, "made for another model .head"),
    "frames": ({"num_frames": 8}, "made for another model .num_frames"),
    "backbone": ({"backbone_options": {"temporal_kernels": False}}, "made for another model .backbone_options"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_form_is_refused(name: str) -> None:
    changes, message = REFUSED[name]
    model = tiny_model(bn="per_domain")
    other = tiny_model(**({"bn": "per_domain"} | changes))
    before = list(model.tensors())
    with pytest.raises(MdlError, match=message):
        model.mount("new", packed(other, "a"))
    assert list(model.tensors()) == before


def test_other_tensors_are_refused() -> None:
    model = tiny_model()
    pack = packed(sibling(model, "new", 3), "new")
    for key in ("backbone/blocks.0.multipathway_blocks.0.conv_t.weight", "shared/stage2/weight"):
        changed = copy.deepcopy(model)
        tensor = next(t for k, t in changed.tensors().items() if k.startswith(key.split("/")[0]))
        changed.mount("new", pack)
        changed.unmount("new")
        with torch.no_grad():
            tensor.flatten()[0] += 1e-12  # the digest notices a bit, and that it changed since the last mount
        noun = "backbone" if key.startswith("backbone") else "shared part"
        with pytest.raises(MdlError, match=f"trained on another {noun}"):
            changed.mount("new", pack)
    for name, message in (("a", "domain 'a' already"), ("shared", "cannot be called"), ("a/b", "cannot be called")):
        with pytest.raises(MdlError, match=message):
            model.mount(name, pack)
    fewer = {key: tensor for key, tensor in pack.tensors.items() if key != "head/bias"}
    for tensors, message in (
        (fewer, "missing head/bias"),
        ({**pack.tensors, "head/more": torch.zeros(1)}, "unknown head/more"),
        ({**fewer, "head/bias": torch.zeros(9)}, "shape of head/bias"),
    ):
        with pytest.raises(MdlError, match=message):
            model.mount("new", dataclasses.replace(pack, tensors=tensors))
    assert list(model.spec.domains) == ["a", "b"]
    assert not [key for key in model.tensors() if key.startswith("new/")]
    with pytest.raises(MdlError, match="no domain 'c'"):
        model.unmount("c")


def test_the_digest_is_of_the_content_alone() -> None:
    model = tiny_model()
    digests = model.digests()
    assert copy.deepcopy(model).channels_last().digests() == digests
    assert content_digest({}) == content_digest({})
    named = dict(library_tensors(model.backbone.net))
    assert content_digest(named) == digests["backbone"]
    assert content_digest(dict(reversed(named.items()))) == digests["backbone"]
    for changed in (
        {"x": torch.zeros(2)},
        {"x": torch.zeros(1, 2)},
        {"x": torch.zeros(2).int()},
        {"y": torch.zeros(2)},
    ):
        assert content_digest(changed) != content_digest({"x": torch.tensor([0.0, -0.0])})


def _with_header(path: Path, **changes: Any) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as handle:
        header = json.loads(handle.metadata()["mdltool"])
    save_file(load_file(path), path, {"mdltool": json.dumps(header | changes)})


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    pack = packed(tiny_model(), "a")
    path = tmp_path / "a.safetensors"
    path.write_bytes(pack.to_bytes())
    data = path.read_bytes()
    read_pack(path, verify=True)
    for content, message in (
        (b"", "cannot be read"),
        (data[:-9], "cannot be read"),
        (data[:100], "cannot be read"),
        (b"<html>" * 50, "cannot be read"),
    ):
        path.write_bytes(content)
        with pytest.raises(MdlError, match=message):
            read_pack(path)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(MdlError, match="damaged"):
        read_pack(path, verify=True)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(MdlError, match="holds no domain"):
        read_pack(path)
    save_file({"weight": torch.zeros(2)}, path, {"mdltool": "[1]"})
    with pytest.raises(MdlError, match="holds no domain"):
        read_pack(path)
    for changes, message in (
        ({"schema": 2}, "has schema 2"),
        ({"kind": "checkpoint"}, "holds no domain"),
        ({"outputs": None}, "cannot be read"),
        ({"task": "multi_label"}, "damaged"),
    ):
        path.write_bytes(data)
        _with_header(path, **changes)
        with pytest.raises(MdlError, match=message):
            read_pack(path, verify=True)
    with pytest.raises(MdlError, match="no such file"):
        read_pack(tmp_path / "b.safetensors")


def test_what_training_alone_reads_does_not_keep_domains_apart() -> None:
    """Dropout and how heads began; the rest of the spec does, with every default named."""
    spec = tiny_spec()
    same = [{"dropout": 0.9}, {"head_std": 3.0, "head_init": "normal"}, {"domains": ("x",)}, {"head_hidden": 3}]
    same.append({"normalize": {"a": {"mean": [0.0] * 3, "std": [1.0] * 3}}})  # the domain brings its own
    assert all(model_form(tiny_spec(**changes)) == model_form(spec) for changes in same)
    explicit = tiny_spec(options={"ln": "channel", "kt": 3}, backbone_options={"pool": "adaptive"})
    assert model_form(explicit) == model_form(spec)
    free = {"domains", "dropout", "head_init", "head_std", "logit_dropout", "head_hidden", "normalize", "streams"}
    assert set(model_form(tiny_spec(mute=["mhva"]))) - {"mute"} == set(model_form(spec)), (
        "named where it says anything"
    )
    free |= {"mute"}
    assert set(model_form(spec)) == {field.name for field in dataclasses.fields(ModelSpec)} - free


def test_every_batchnorm_of_a_mounted_domain_is_its_own() -> None:
    model = tiny_model(bn="per_domain")
    donor = sibling(model, "new", 3)
    model.mount("new", packed(donor, "new"))
    norms = [key for key, module in model.backbone.net.named_modules() if isinstance(module, BATCH_NORMS)]
    assert norms
    for path, norm in model.norms.items():
        assert torch.equal(norm.statistics["new"].weight, donor.norms[path].statistics["new"].weight)
        assert not torch.equal(norm.statistics["new"].weight, norm.statistics["a"].weight)
