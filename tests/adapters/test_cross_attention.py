"""Cross-attention adapters against their formulas and properties (spec cm3t 2.4 to 2.6, 6 and 7)."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdltool.adapters.base import AdaptedSite
from mdltool.adapters.cross_attention import CaaOptions, CrossAttentionAdapter, pooled_rows, sinusoid
from mdltool.errors import MdlError
from mdltool.model import MultiDomainModel, build_model
from mdltool.model_spec import AdapterSpec, build_backbone
from mdltool.types import Site, StreamSpec, StreamTokens
from mdltool.wrapping import TokenGrid, detach
from tests.adapters.streams import (
    AUDIO,
    BOTH,
    FLOW,
    SIZES,
    TEXT,
    both,
    clips,
    randomise,
    stream_model,
    stream_spec,
    tokens,
)

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"scaled": False},
    {"fusion": "sum"},
    {"fusion": "mmca"},
    {"value": "vision"},
    {"query": "block"},
    {"pos": "sin"},
)
NAMES = [" ".join(f"{k}={v}" for k, v in options.items()) or "default" for options in OPTIONS]


def affine(layer: Any, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def by_hand(adapter: Any, options: CaaOptions, x_NC: Tensor, b_NR: Tensor, streams: dict[str, Tensor]) -> Tensor:
    """The addition [N, C] for one clip, head by head; streams: the present ones [M, D], in order."""
    fusion, d = adapter.fusion, options.d
    frames = b_NR.view(2, -1, b_NR.shape[1]).mean(1)  # of a grid of two time slices

    def attended(name: str, query: Tensor) -> Tensor:
        e, layers = streams[name], adapter.streams[name]
        rows = e
        if options.value == "vision":
            rows = nn.functional.adaptive_avg_pool1d(frames.T[None], len(e))[0].T
        keys = affine(layers["key"], e + sinusoid(*e.shape, e.device) if options.pos == "sin" else e)
        values, size = affine(layers["value"], rows), d // options.heads
        parts = []
        for h in range(options.heads):
            part = slice(h * size, (h + 1) * size)
            scores = query[:, part] @ keys[:, part].T / math.sqrt(size)
            parts.append(scores.softmax(1) @ values[:, part])
        return torch.cat(parts, 1)

    source = x_NC if options.query == "block" else b_NR
    if not streams:
        return torch.zeros_like(x_NC)
    if options.fusion == "mmca":
        h = affine(fusion.residual, b_NR)
        for name in streams:
            query = affine(fusion.queries[name], source if name == fusion.founding[0] else h)
            h = h + affine(fusion.outs[name], attended(name, query))
        return h @ adapter.out.weight.T + adapter.out_bias
    z = {name: attended(name, affine(fusion.query, source)) for name in streams}
    if options.fusion == "sum":
        mixed = torch.stack(list(z.values())).sum(0)
    else:
        q = affine(fusion.q, b_NR)
        scores = torch.stack([(q * affine(fusion.k, z[n])).sum(1) for n in z], 1)
        w = (scores / math.sqrt(d) if options.scaled else scores).softmax(1)
        mixed = sum((w[:, i : i + 1] * affine(fusion.v, z[n]) for i, n in enumerate(z)), torch.zeros(()))
    return mixed @ adapter.out.weight.T + adapter.out_bias


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_it_is_the_formula_for_every_mixture_of_streams(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    chosen = CaaOptions(d=8, heads=2, **options)
    site = Site("s", "s", "mlp", "grid", 10, (2, 2, 3), "mlp", 1)
    adapter = CrossAttentionAdapter(site, chosen, 6, BOTH).double()
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.5)
    x, b = torch.randn(4, 2, 2, 3, 10).double(), torch.randn(4, 2, 2, 3, 6).double()
    given = {"audio": tokens(3, 0, 2, 0), "flow": tokens(1, 4, 0, 0, seed=5)}
    found = adapter(x, b, TokenGrid(2, 2, 3, "grid"), given)
    for clip in range(4):
        present = {n: s.tokens_BMD[clip][s.mask_BM[clip]] for n, s in given.items() if s.mask_BM[clip].any()}
        expected = by_hand(adapter, chosen, x[clip].flatten(0, 2), b[clip].flatten(0, 2), present)
        torch.testing.assert_close(found[clip].flatten(0, 2), expected, rtol=0, atol=1e-10)
    assert (found[3] == 0).all(), "no stream, no bias"


def test_rows_are_pooled_as_adaptive_pooling_does_to_each_clips_own_number() -> None:
    rows = torch.randn(3, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    found = pooled_rows(rows, mask)
    for clip, count in enumerate((3, 1, 4)):
        expected = nn.functional.adaptive_avg_pool1d(rows[clip].T[None], count)[0].T
        torch.testing.assert_close(found[clip, :count], expected)


@pytest.mark.parametrize("backbone", SIZES)
def test_the_start_is_the_model_without_it(backbone: str) -> None:
    spec = stream_spec(backbone)
    model = stream_model(spec, warm=False)
    bare = copy.deepcopy(model.backbone)
    detach(bare.net)
    x = clips(spec)
    with torch.no_grad():
        assert torch.equal(model(x, "a", both(2, 0, 3)), model(x, "a"))
        torch.testing.assert_close(model(x, "a"), model.heads["a"](bare(x)).mean(1), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("backbone", "mhva"), [*((b, {}) for b in SIZES), ("clip_vit_tiny", {"cls": "skip"})])
def test_streams_matter_and_their_absence_leaves_no_bit(backbone: str, mhva: dict[str, Any]) -> None:
    spec = stream_spec(backbone, mhva=mhva)
    model = stream_model(spec)
    x = clips(spec)
    with torch.no_grad():
        without, mixed = model(x, "a"), model(x, "a", {"audio": tokens(2, 0, 3), "flow": tokens(1, 0, 0)})
        gone = model(x, "a", {"audio": tokens(0, 0, 0), "flow": tokens(0, 0, 0)})
        assert torch.equal(gone, without)
        assert torch.equal(mixed[1], without[1])
        assert (mixed - without)[[0, 2]].abs().amin(1).min() > 1e-6
        alone = model(x, "a", {"audio": tokens(2, 0, 3)})
        assert torch.equal(alone[2], mixed[2]), "a stream that the clip has not"


def test_class_tokens_pass_as_the_vision_adapters_option_says() -> None:
    """Skipped in the last block, whose class token alone is read, nothing is added."""
    head0, skip = (stream_model(stream_spec("vivit_tiny", mhva={"cls": c}, layers="3")) for c in ("head0", "skip"))
    x, streams = clips(head0.spec), both(2, 1, 3)
    with torch.no_grad():
        assert torch.equal(skip(x, "a", streams), skip(x, "a"))
        assert not torch.equal(head0(x, "a", streams), head0(x, "a"))


def test_absent_is_as_never_built_and_order_does_not_matter() -> None:
    spec = stream_spec()
    model, x = stream_model(spec), clips(spec)
    one = stream_model(stream_spec(streams={"a": {"audio": AUDIO}, "b": {}}))
    turned = stream_model(stream_spec(streams={"a": {"flow": FLOW, "audio": AUDIO}, "b": BOTH}))
    state = model.tensors()
    for other in (one, turned):
        other.load_tensors({key: state.get(key, own) for key, own in other.tensors().items()}, "test")
    given = both(2, 1, 3)
    with torch.no_grad():
        audio = {"audio": given["audio"]}
        assert torch.equal(model(x, "a", audio), one(x, "a", audio))
        assert torch.equal(model(x, "a", audio | {"flow": tokens(0, 0, 0)}), one(x, "a", audio))
        torch.testing.assert_close(turned(x, "a", given), model(x, "a", given), rtol=0, atol=1e-10)


def test_padding_order_and_repetition_of_tokens_change_nothing() -> None:
    spec = stream_spec()
    model, x = stream_model(spec), clips(spec)
    given = both(2, 1, 3)
    long = {"audio": tokens(2, 1, 3, longest=3), "flow": given["flow"]}
    padded = nn.functional.pad(long["audio"].tokens_BMD, (0, 0, 0, 4), value=7.0)
    long["audio"] = StreamTokens(padded, nn.functional.pad(long["audio"].mask_BM, (0, 4)))
    turned = {n: StreamTokens(s.tokens_BMD.flip(1), s.mask_BM.flip(1)) for n, s in given.items()}
    with torch.no_grad():
        expected = model(x, "a", given)
        for other in (long, turned):
            torch.testing.assert_close(model(x, "a", other), expected, rtol=0, atol=1e-10)
        for wrapper in model.sites.values():  # the second stream with the first one's weights
            if wrapper.reads_streams:
                streams: Any = wrapper.adapters["a"].streams
                streams["flow"].load_state_dict(streams["audio"].state_dict())
        twice = model(x, "a", {"audio": given["audio"], "flow": given["audio"]})
        torch.testing.assert_close(twice, model(x, "a", {"audio": given["audio"]}), rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_every_parameter_learns_within_two_steps_and_nothing_else_moves(options: dict[str, Any]) -> None:
    spec = stream_spec("clip_vit_tiny", **options)
    linear = {"embedder": "linear", "input": 7}
    spec = replace(spec, streams={d: {n: replace(s, **linear) for n, s in BOTH.items()} for d in "ab"})
    model = stream_model(spec, warm=False)
    model.apply_regime("frozen", "frozen", adapters=["caa"])
    model.train()
    before = {key: tensor.clone() for key, tensor in model.tensors().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, given = (
        torch.optim.SGD(trained, lr=0.05),
        {n: tokens(2, 0, 3, width=7, seed=s) for s, n in enumerate(BOTH)},
    )
    seen: dict[str, Tensor] = {}
    for step in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(clips(spec), "a", given), torch.tensor([0, 1, 2])).backward()
        fresh = {
            k: p.grad for k, p in model.tensors().items() if isinstance(p, nn.Parameter) and p.grad is not None
        }
        assert all(bool(grad.isfinite().all()) for grad in fresh.values())
        if step == 0:  # W_O and c_O alone, and the head
            moving = {key.split("/")[-1] for key, grad in fresh.items() if grad.any() and "/head/" not in key}
            assert moving == {"out.weight", "out_bias"}
        seen = {key: seen.get(key, torch.zeros(())) + grad.abs() for key, grad in fresh.items()}
        optimizer.step()
    own = {key for key in seen if key.startswith("a/")}
    assert {k for k, t in model.tensors().items() if "+caa" in k and k.startswith("a/")} <= own
    for key in own:
        # A constant added to all of a softmax's scores; with values from vision an embedder makes keys alone.
        dead = (
            "key.bias",
            "fusion.k.bias",
            *(("norm.bias", "proj.bias") if options.get("value") == "vision" else ()),
        )
        if not key.endswith(dead):
            assert seen[key].sum() > 1e-9, key
    for key, tensor in model.tensors().items():
        if key not in own:
            assert torch.equal(tensor, before[key]), key


def test_every_tensor_changes_the_output() -> None:
    """On random weights; but for biases of keys."""
    spec = replace(
        stream_spec(), streams={d: {"audio": AUDIO, "flow": replace(FLOW, late=True), "text": TEXT} for d in "ab"}
    )
    model, x = stream_model(spec), clips(spec)
    given = {name: tokens(2, 3, 1, seed=i) for i, name in enumerate(("audio", "flow", "text"))}
    with torch.no_grad():
        expected = model(x, "a", given)
        for site, wrapper in model.sites.items():
            if wrapper.reads_streams:
                for key, parameter in wrapper.adapters["a"].named_parameters():
                    kept = parameter.clone()
                    parameter.add_(torch.randn_like(parameter))
                    difference = (model(x, "a", given) - expected).abs().max()
                    parameter.copy_(kept)
                    dead = key.endswith(("key.bias", "fusion.k.bias"))
                    assert (difference < 1e-10) == dead, (site, key)


def test_all_weights_are_stored_by_site_copied_and_detached() -> None:
    spec = stream_spec("clip_vit_tiny")
    model, x = stream_model(spec), clips(spec)
    given = both(2, 0, 3)
    expected = model(x, "b", given)
    assert torch.equal(copy.deepcopy(model)(x, "b", given), expected)
    other = stream_model(spec, seed=5)
    other.load_tensors(model.tensors(), "test")
    assert torch.equal(other(x, "b", given), expected)
    assert "a/block1.mlp+caa/streams.audio.key.weight" in model.tensors()
    library = list(build_backbone(spec).net.state_dict())
    detach(model.backbone.net)
    assert not any(isinstance(module, AdaptedSite) for module in model.backbone.modules())
    assert list(model.backbone.net.state_dict()) == library


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    spec = stream_spec(streams={d: {"audio": replace(AUDIO, embedder="linear")} for d in "ab"})
    grads = []
    for checkpointed in (False, True):
        model = stream_model(spec)
        if checkpointed:
            model.checkpoint_activations()
        model(clips(spec), "a", {"audio": tokens(2, 0, 3)}).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backbone", ["swin3d_tiny", "clip_vit_tiny"])
def test_a_batch_of_several_domains_is_that_of_each(backbone: str) -> None:
    spec = stream_spec(backbone, streams={"a": BOTH, "b": {"flow": FLOW}})
    model, x = stream_model(spec), clips(spec, 4)
    given = {"audio": tokens(2, 3, 0, 1), "flow": tokens(1, 0, 2, 2)}
    names = ["b", "a", "b", "a"]
    with torch.no_grad():
        found = model(x, names, given)
        for row, name in enumerate(names):
            rows = {n: StreamTokens(s.tokens_BMD[[row]], s.mask_BM[[row]]) for n, s in given.items()}
            own = {n: s for n, s in rows.items() if n in spec.streams[name]}
            torch.testing.assert_close(found[row], model(x[[row]], name, own)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("late", ["gain", "gate"])
@pytest.mark.parametrize("fusion", ["adapterfusion", "sum"])
def test_a_later_stream_changes_no_bit_until_it_is_trained(fusion: str, late: str) -> None:
    if (fusion, late) == ("sum", "gate"):
        with pytest.raises(ValueError, match="late: gate is of fusion: adapterfusion"):
            CaaOptions(fusion="sum", late="gate")
        return
    spec = stream_spec(streams={"a": BOTH, "b": BOTH}, fusion=fusion, late=late)
    before, x = stream_model(spec), clips(spec, 4)
    larger = replace(spec, streams={d: BOTH | {"text": replace(TEXT, late=True)} for d in "ab"})
    after = stream_model(larger, warm=False)
    old = before.tensors()
    after.load_tensors({key: old.get(key, own) for key, own in after.tensors().items()}, "test")
    given = {"audio": tokens(2, 0, 0, 3), "flow": tokens(1, 2, 0, 0)}
    new = given | {"text": tokens(2, 2, 2, 0, seed=9)}
    with torch.no_grad():
        assert torch.equal(after(x, "a", new), before(x, "a", given))
    for key, tensor in after.tensors().items():
        tensor.requires_grad_(key.startswith("a/") and key not in old)
    optimizer = torch.optim.SGD([p for p in after.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(after(x, "a", new), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
        after.constrain()
    with torch.no_grad():
        moved = after(x, "a", new) - before(x, "a", given)
        assert torch.equal(after(x, "a", given), before(x, "a", given)), "clips without it, whatever it learned"
    assert (moved[3] == 0).all()
    gates = [p for key, p in after.tensors().items() if "gates.text" in key]
    assert all(gate >= 0 for gate in gates)
    assert moved[:3].abs().max() > 0 or gates


def test_a_gate_opens_from_nothing() -> None:
    """Also for a clip without a founding stream, whose softmax would be the late one's alone."""
    spec = stream_spec(streams={"a": {"audio": AUDIO, "text": replace(TEXT, late=True)}}, late="gate")
    model, x = stream_model(spec), clips(spec)
    given = {"audio": tokens(2, 1, 0), "text": tokens(1, 0, 2)}
    found = []
    with torch.no_grad():
        for gate in (0.0, 1e-9, 1.0):
            for key, tensor in model.tensors().items():
                if "gates.text" in key:
                    tensor.fill_(gate)
            found.append(model(x, "a", given))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-7)
    moved = (found[2] - found[0]).abs().amax(1)
    assert moved[0] > 1e-6
    assert (moved[1:] == 0).all()


def test_mmca_takes_no_later_stream() -> None:
    spec = stream_spec(streams={"a": BOTH | {"text": replace(TEXT, late=True)}}, fusion="mmca")
    with pytest.raises(MdlError, match="adapterfusion"):
        build_model(spec)


def test_it_needs_a_vision_adapter_right_inside() -> None:
    spec = stream_spec()
    for adapters in (spec.adapters[1:], [spec.adapters[2], spec.adapters[0]]):
        with pytest.raises(MdlError, match="reads the bottleneck of a vision adapter"):
            build_model(replace(spec, adapters=adapters))
    few = [AdapterSpec("mhva", "all", {"layers": "1-3"}), spec.adapters[2]]
    with pytest.raises(MdlError, match=r"block4\.mlp"):
        build_model(replace(spec, adapters=few))


def test_the_default_blocks_leave_out_the_first_stage_of_a_pyramid_and_streams_may_have_fewer() -> None:
    def read(model: MultiDomainModel) -> list[str]:
        return [name.split(".")[0] for name, wrapper in model.sites.items() if wrapper.reads_streams]

    assert read(stream_model(stream_spec())) == ["block3", "block4"]
    assert len(read(stream_model(stream_spec("vivit_tiny")))) == len(
        build_backbone(stream_spec("vivit_tiny")).block_paths()
    )
    model = stream_model(stream_spec(streams={"a": {"audio": replace(AUDIO, layers="4"), "flow": FLOW}}))
    held = {key.split("/")[1] for key in model.tensors() if "streams.audio" in key}
    assert held == {"block4.mlp+caa"}


def test_without_streams_nothing_is_made() -> None:
    spec = stream_spec(streams={})
    model = stream_model(spec)
    assert not any("caa" in key for key in model.tensors())
    plain = stream_model(replace(spec, adapters=spec.adapters[:2]))
    assert torch.equal(model(clips(spec), "a"), plain(clips(spec), "a"))


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"noise": tokens(1, 1, 1)}, "reads no stream 'noise'"),
        ({"audio": tokens(1, 1)}, r"has shape \[2, 1, 12\]"),
        ({"audio": tokens(1, 1, 1, width=5)}, r"not \[3, tokens, 12\]"),
    ],
)
def test_streams_that_do_not_fit_are_refused(given: dict[str, StreamTokens], what: str) -> None:
    spec = stream_spec()
    with pytest.raises(MdlError, match=what):
        stream_model(spec)(clips(spec), "a", given)


def test_one_name_is_one_thing_in_all_domains() -> None:
    other = StreamSpec("audio", 9, 9)
    with pytest.raises(MdlError, match="width 12 in the domain a and 9 in b"):
        build_model(stream_spec(streams={"a": {"audio": AUDIO}, "b": {"audio": other}}))
    with pytest.raises(MdlError, match="cannot be called 'type'"):
        build_model(stream_spec(streams={"a": {"type": AUDIO}}))


def test_stream_dropout_drops_whole_streams_of_clips_in_training_alone() -> None:
    spec = stream_spec(stream_dropout=0.5)
    spec.adapters[1].options["dropout"] = 0.0
    model, x, given = stream_model(spec), clips(spec, 6), both(*[2] * 6)
    with torch.no_grad():
        choices = {  # with both, either and none
            model(
                x[:1],
                "a",
                {
                    n: StreamTokens(s.tokens_BMD[:1] * k, s.mask_BM[:1] & k)
                    for (n, s), k in zip(((n, s) for n, s in given.items()), kept, strict=True)
                },
            )[0, 0].item()
            for kept in ((True, True), (True, False), (False, True), (False, False))
        }
        assert torch.equal(model(x, "a", given), model(x, "a", given))
        model.train()
        torch.manual_seed(0)
        one = {n: StreamTokens(s.tokens_BMD[:1], s.mask_BM[:1]) for n, s in given.items()}
        seen = [model.logits(model.features(x[:1], "a", one), "a")[0, 0].item() for _ in range(24)]
    assert len(choices) == 4
    assert len({round(value, 6) for value in seen} & {round(value, 6) for value in choices}) >= 3


def test_only_the_named_types_train_and_the_frozen_ones_are_in_eval_mode() -> None:
    model = stream_model(stream_spec(), warm=False)
    given, x = both(2, 1, 3), clips(model.spec)
    model.apply_regime("frozen", "frozen", adapters=["mhva", "prefix"])
    trained = {
        model.types[s] for s, w in model.sites.items() if any(p.requires_grad for p in w.adapters.parameters())
    }
    assert trained == {"mhva", "prefix"}
    model.train()
    assert all(
        m.training for s, w in model.sites.items() if model.types[s] == "prefix" for m in w.adapters.modules()
    )
    counted = [("a", 3)]
    assert not model.embedders.routed(given, counted, x.dtype), "nothing reads them yet"
    model.apply_regime("frozen", "frozen", adapters=["caa"])
    model.train()
    for site, wrapper in model.sites.items():
        own = model.types[site] == "caa"
        assert all(p.requires_grad == own for p in wrapper.adapters.parameters())
        assert all(m.training == own for m in wrapper.adapters.values())
    assert all(p.requires_grad for p in model.heads.parameters())
    assert set(model.embedders.routed(given, counted, x.dtype)["a"]) == {"audio", "flow"}
    model(x, "a", given)
    copy.deepcopy(model)  # nothing of the step's graph is held
    randomise(model)
    model.apply_regime("heads", "frozen")
    assert not model.embedders.idle, "what was trained is used, also where it does not train"


def test_muted_types_stay_out_but_their_bottleneck_is_read() -> None:
    """Spec 2.8, full_caa."""
    spec = stream_spec()
    model, x, given = stream_model(spec), clips(spec), both(2, 1, 3)
    muted = build_model(replace(spec, mute=["mhva", "prefix"])).double().eval()
    muted.load_tensors(model.tensors(), "test")
    bare = copy.deepcopy(model.backbone)
    detach(bare.net)
    with torch.no_grad():
        torch.testing.assert_close(muted(x, "a"), model.heads["a"](bare(x)).mean(1), rtol=0, atol=1e-10)
        shown = muted(x, "a", given)
        assert not torch.allclose(shown, muted(x, "a"))
        for key, tensor in muted.tensors().items():
            if key.startswith("a/") and key.endswith((".mlp/up", ".mlp/scale", ".attn/prefix")):
                tensor.add_(1)
        assert torch.equal(muted(x, "a", given), shown)
        muted.tensors()["a/block4.mlp/down_bias"].add_(1)
        assert not torch.equal(muted(x, "a", given), shown)
    muted.apply_regime("full", "frozen", adapters=["caa"])
    trains = {key.split("/")[-1] for key, t in muted.tensors().items() if t.requires_grad and key.startswith("a/")}
    assert "down" not in trains
    assert "out.weight" in trains
    assert all(p.requires_grad for p in muted.backbone_parameters())


def test_bf16_autocast() -> None:
    spec = stream_spec("clip_vit_tiny")
    model, given = stream_model(spec).float(), both(2, 0, 3)
    x = clips(spec).float()
    expected = model(x, "a", given)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x, "a", given)
    assert (rough - expected).norm() < 0.1 * expected.norm()
