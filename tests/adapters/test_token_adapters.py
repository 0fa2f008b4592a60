"""MHVA, AdaptFormer, prefixes and LoRA (spec cm3t 2.2, 2.3, 7)."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mdltool.adapters import ADAPTERS
from mdltool.adapters.mhva import MhvaAdapter, MhvaOptions
from mdltool.backbones.transformer import Prefix, attend
from mdltool.model import MultiDomainModel
from mdltool.model_spec import AdapterSpec, ModelSpec, build_backbone
from mdltool.types import Site
from mdltool.wrapping import TokenGrid, detach, library_modules
from tests.models import clips, tiny_model

Entry = tuple[str, dict[str, Any]]
LAYOUTS = ("frame", "clip", "grid")


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def model(backbone: str, *entries: Entry, sites: Any = "all", **changes: Any) -> MultiDomainModel:
    """A small model in float64 whose adapters are away from their special starts."""
    parts = [AdapterSpec(kind, sites, options) for kind, options in entries]
    made = tiny_model(None, backbone=backbone, adapters=parts, bn="frozen", **changes)
    for wrapper in made.sites.values():
        for parameter in wrapper.adapters.parameters():
            nn.init.normal_(parameter, std=0.3)
    made.route.domain = "a"
    return made.requires_grad_(False)


def adapter(
    kind: str,
    channels: int = 6,
    layout: str = "frame",
    window: tuple[int, int, int] | None = None,
    grid: tuple[int, int, int] = (1, 1, 1),
    **options: Any,
) -> Any:
    """One adapter in float64, its parameters random."""
    method = ADAPTERS.load(kind)
    site = Site("here", "here", min(method.kinds), layout, channels, grid, window=window)
    torch.manual_seed(0)
    made = method(site, method.Options(**options)).double().eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made.requires_grad_(False)


def tokens(grid: TokenGrid, batch: int = 2, channels: int = 6) -> Tensor:
    positions = grid.height * grid.width
    shape = {
        "frame": (batch * grid.frames, 1 + positions, channels),
        "clip": (batch, 1 + grid.frames * positions, channels),
        "grid": (batch, grid.frames, grid.height, grid.width, channels),
    }[grid.layout]
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def patch(grid: TokenGrid, b: int, t: int, i: int, j: int) -> tuple[int, ...]:
    """Where a patch token lies, by the definition of the layouts."""
    return {
        "frame": (b * grid.frames + t, 1 + i * grid.width + j),
        "clip": (b, 1 + (t * grid.height + i) * grid.width + j),
        "grid": (b, t, i, j),
    }[grid.layout]


def patches(grid: TokenGrid, batch: int = 2) -> Iterator[tuple[int, int, int, int]]:
    return itertools.product(range(batch), range(grid.frames), range(grid.height), range(grid.width))


def identity(x: Tensor) -> Tensor:
    return x


# Heads of positions, drawn by hand: chunk, heads, window, rows of the map.
MAPS: list[tuple[str, int, tuple[int, int, int] | None, list[str]]] = [
    ("raster", 3, None, ["0001", "1122"]),
    ("raster", 7, None, ["01", "35"]),
    ("raster", 7, None, ["000", "111", "222", "333", "444", "555", "666"]),
    ("grid:2x2", 4, None, ["000111", "000111", "222333", "222333"]),
    ("grid:2x2", 2, None, ["0000", "0000", "1111"]),
    ("grid:2x3", 6, None, ["00112", "00112", "33445", "33445"]),
    ("windows", 4, (2, 2, 3), ["000111", "000111", "222333", "222333"]),
    ("windows", 4, (8, 3, 3), ["00011", "00011", "00011", "22233"]),
    ("windows", 2, (8, 3, 3), ["00000", "00000", "00000", "11111"]),
    ("windows", 3, (8, 7, 7), ["00", "00"]),
    ("windows", 4, None, ["0000000111"] * 2),
    ("in_window", 4, (1, 2, 2), ["0101", "2323", "0101", "2323"]),
    ("in_window", 2, (1, 2, 2), ["0000", "1111", "0000", "1111"]),
    ("in_window", 3, (8, 7, 7), ["00", "12"]),
]


def heads_of(height: int, width: int, heads: int, chunk: str = "raster", window: Any = None) -> Tensor:
    """The head that each position gets, read from the output: every head gives its own number."""
    options = {"heads": heads, "r": 1, "chunk": chunk, "scale": "fixed", "scale_init": 1.0}
    made = adapter("mhva", 1, "grid", window, (2, height, width), **options)
    made.up.zero_()
    made.up_bias.copy_(torch.arange(len(made.up_bias))[:, None])
    found = made(torch.zeros_like, torch.ones(1, 2, height, width, 1).double(), TokenGrid(2, height, width, "grid"))
    assert torch.equal(found[0, 0], found[0, 1]), "time is not divided"
    return found[0, 0, :, :, 0].long()


def test_windows_divide_time_and_cap_the_heads() -> None:
    """Spec cm3t 3.3: k = floor(q H_s / n_windows), q = (wt n_h + wh) n_w + ww, H_s = min(H, nominal windows)."""
    grid = TokenGrid(5, 4, 3, "grid")
    made = adapter("mhva", 1, "grid", (2, 4, 2), (5, 4, 3), heads=4, r=1, chunk="windows", scale="fixed")
    made.up.zero_()
    made.up_bias.copy_(torch.arange(4)[:, None])
    found = made(torch.zeros_like, torch.ones(2, 5, 4, 3, 1).double(), grid)[1, ..., 0] / 4
    expected = torch.empty(5, 4, 3).double()
    for t, i, j in itertools.product(range(5), range(4), range(3)):
        expected[t, i, j] = ((t // 2) * 1 + i // 4) * 2 + j // 2
    assert torch.equal(found, (expected * 4 / 6).floor())
    few = adapter("mhva", 1, "grid", (8, 7, 7), (16, 7, 7), heads=8, chunk="windows")
    assert len(few.up) == 2


def test_windows_may_follow_the_shift_of_the_attention() -> None:
    """Spec cm3t 3.3: the padded map, rolled as for the attention, has whole windows of one head each."""
    spec = ModelSpec("swin3d_tiny", {}, 8, 32, {}, [])
    sites = build_backbone(spec).sites()
    assert [sites[f"block{i}.mlp"].shift for i in (1, 2)] == [(0, 0, 0), (1, 1, 1)]
    assert sites["block2.mlp"].window == (2, 3, 3)
    options = MhvaOptions(heads=4, r=1, chunk="windows", scale="fixed", scale_init=1.0, follow_shift=True)
    site = Site("here", "here", "mlp", "grid", 1, (3, 5, 4), window=(2, 3, 3), shift=(1, 1, 1))
    made = MhvaAdapter(site, options)
    made.up_bias.data.copy_(torch.arange(4.0)[:, None])
    found = made.adapt(torch.ones(1, 3, 5, 4, 1), TokenGrid(3, 5, 4, "grid"))[0, ..., 0].detach()
    padded = nn.functional.pad(found, (0, 2, 0, 1, 0, 1), value=-1).roll((-1, -1, -1), (0, 1, 2))
    windows = padded.unflatten(2, (2, 3)).unflatten(1, (2, 3)).unflatten(0, (2, 2)).permute(0, 2, 4, 1, 3, 5)
    heads = [set(window.flatten().tolist()) - {-1} for window in windows.flatten(0, 2)]
    assert heads == [{number // 2} for number in range(8)]
    with pytest.raises(ValueError, match="follow_shift is of chunk: windows"):
        MhvaOptions(follow_shift=True)


@pytest.mark.parametrize(("chunk", "heads", "window", "rows"), MAPS)
def test_chunk_maps(chunk: str, heads: int, window: tuple[int, int, int] | None, rows: list[str]) -> None:
    expected = torch.tensor([[int(digit) for digit in row] for row in rows])
    assert torch.equal(heads_of(*expected.shape, heads, chunk, window), expected)


def test_raster_chunks_are_even_bands() -> None:
    """Spec cm3t, property 6."""
    for size in (7, 14, 28, 56):
        band = torch.arange(size) // (size // 7)
        assert torch.equal(heads_of(size, size, 7), band[:, None].expand(size, size))
    assert torch.bincount(heads_of(16, 16, 7).flatten()).tolist() == [37, 37, 36, 37, 36, 37, 36]
    for height, width, heads in ((5, 3, 4), (3, 3, 7), (9, 4, 5)):
        found = heads_of(height, width, heads).flatten()
        sizes = torch.bincount(found, minlength=heads)
        assert (found.diff() >= 0).all()
        assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"heads": 3},
        {"heads": 1},
        {"heads": 2, "chunk": "grid:1x2", "cls": "own"},
        {"cls": "skip", "scale": "head"},
        {"cls": "own", "scale": "head"},
        {"heads": 1, "cls": "own", "scale": "fixed", "scale_init": 0.7},
    ],
)
def test_mhva_token_by_token(layout: str, options: dict[str, Any]) -> None:
    """Spec cm3t 2.2: inner(u) + s (ReLU(u W_down[k] + c_down[k]) W_up[k] + c_up[k])."""
    heads, chunk = options.get("heads", 7), options.get("chunk", "raster")
    made, grid = adapter("mhva", layout=layout, r=5, **options), TokenGrid(3, 2, 4, layout)
    x = tokens(grid)
    expected = 2 * x

    def add(index: tuple[int, ...], head: int) -> None:
        scale = made.scale[head] if options.get("scale") == "head" else made.scale
        hidden = (x[index] @ made.down[head] + made.down_bias[head]).clamp(min=0)
        expected[index] += scale * (hidden @ made.up[head] + made.up_bias[head])

    for b, t, i, j in patches(grid):
        add(patch(grid, b, t, i, j), (i * 4 + j) * heads // 8 if chunk == "raster" else j // 2)
    if layout != "grid" and options.get("cls") != "skip":
        for row in range(len(x)):
            add((row, 0), heads if options.get("cls") == "own" else 0)
    assert_same(made(lambda u: 2 * u, x, grid), expected)
    assert len(made.down) == heads + (layout != "grid" and options.get("cls") == "own")


def test_mhva_locality() -> None:
    """Spec cm3t, property 5."""
    made, grid = adapter("mhva", heads=3, r=5), TokenGrid(3, 3, 3, "frame")
    made.down_bias.fill_(20)  # no hidden unit is off
    x = tokens(grid)
    before = made(identity, x, grid)
    for k in range(3):
        changed = copy.deepcopy(made)
        changed.up[k] += 1
        moved = (changed(identity, x, grid) != before).any(-1)
        expected = torch.tensor([k == 0] + [row == k for row in range(3) for _ in range(3)])
        assert torch.equal(moved, expected.expand_as(moved))
    order = torch.tensor([2, 0, 1, 4, 5, 3])
    assert_same(made(identity, x[order], grid), before[order])


def test_equal_heads_are_one_plain_adapter() -> None:
    made, plain = adapter("mhva", heads=4, r=5), adapter("mhva", heads=1, r=5)
    for key in ("down", "down_bias", "up", "up_bias"):
        getattr(made, key)[:] = getattr(plain, key)
    made.scale.copy_(plain.scale)
    for height, width in ((4, 4), (3, 3), (1, 2)):
        grid = TokenGrid(2, height, width, "frame")
        assert_same(made(identity, tokens(grid), grid), plain(identity, tokens(grid), grid))


def test_heads_without_positions_get_no_gradient() -> None:
    made, grid = adapter("mhva", r=5), TokenGrid(2, 2, 2, "frame")
    made.requires_grad_(True)
    made(identity, tokens(grid), grid).square().sum().backward()
    for key in ("down", "down_bias", "up", "up_bias"):
        reached = getattr(made, key).grad.flatten(1).ne(0).any(1)
        assert reached.tolist() == [True, True, False, True, False, True, False], key


@pytest.mark.parametrize("size", [7, 4])
def test_mhva_costs_the_same_with_any_number_of_heads(size: int) -> None:
    """Spec cm3t, property 13: 2 N C r multiply-adds, whether the heads divide the positions or not."""
    grid, found = TokenGrid(2, size, size, "frame"), []
    for heads in (1, 7):
        made = adapter("mhva", heads=heads, r=5)
        with FlopCounterMode(display=False) as counter:
            made.adapt(tokens(grid), grid)
        found.append(counter.get_total_flops())
    assert found == [2 * 2 * (2 * 2 * (size * size + 1)) * 6 * 5] * 2


@pytest.mark.parametrize("chunk", ["raster", "grid:2x2", "in_window"])
def test_weights_fit_another_size(chunk: str) -> None:
    options = {"heads": 4, "r": 5, "chunk": chunk, "at": "both"}
    small, large = (model("swin3d_tiny", ("mhva", options), crop=crop) for crop in (32, 48))
    large.load_tensors(small.tensors(), "test")
    x = clips(crop=48)
    assert_same(small(x, "a"), large(x, "a"))
    assert torch.equal(heads_of(8, 8, 4, "grid:2x2")[::2, ::2], heads_of(4, 4, 4, "grid:2x2"))


@pytest.mark.parametrize("chunk", ["grid:2x3", "windows", "in_window"])
def test_chunks_need_no_values_of_tensors(chunk: str) -> None:
    """They compile into one graph and run on the meta device."""
    made, grid = adapter("mhva", heads=4, r=5, chunk=chunk, window=(1, 2, 3)), TokenGrid(2, 4, 5, "frame")
    x = tokens(grid)
    torch._dynamo.reset()
    compiled = torch.compile(lambda u: made(identity, u, grid), backend="eager", fullgraph=True)
    assert_same(compiled(x), made(identity, x, grid))
    torch._dynamo.reset()
    assert copy.deepcopy(made).to("meta")(identity, x.to("meta"), grid).shape == x.shape


def test_windows_beside_the_mlp_are_the_attentions() -> None:
    sites = model("swin3d_tiny", ("mhva", {"chunk": "windows", "at": "both"})).sites
    assert sites["block1.attn"].site.window == (2, 3, 3)
    assert sites["block1.mlp"].site.window == (2, 3, 3)


def test_scales_and_where_mhva_goes() -> None:
    for scale, shape in (("block", ()), ("head", (7,)), ("fixed", None)):
        method = ADAPTERS.load("mhva")
        made = method(Site("s", "s", "mlp", "grid", 6, (1, 1, 1)), method.Options(scale=scale, scale_init=2.5))
        assert (made.scale == 2.5).all()
        owned = dict(made.named_parameters()).get("scale")
        assert (owned is None) == (shape is None)
        assert owned is None or owned.shape == shape
    for at, roles in (("mlp", {"mlp"}), ("attn", {"attn"}), ("both", {"mlp", "attn"})):
        sites = model("vit_tiny", ("mhva", {"r": 4, "at": at})).sites
        assert set(sites) == {f"block{n}.{role}" for n in (1, 2, 3) for role in roles}


def test_adaptformer_is_one_head_with_a_fixed_scale() -> None:
    made, grid = adapter("adaptformer", r=5), TokenGrid(2, 2, 2, "clip")
    assert sum(p.numel() for p in made.parameters()) == 2 * 6 * 5 + 5 + 6
    x = tokens(grid)
    bottleneck = nn.functional.relu(nn.functional.linear(x, made.down[0].T, made.down_bias[0]))
    expected = nn.functional.linear(bottleneck, made.up[0].T, made.up_bias[0])
    assert_same(made(torch.sin, x, grid), x.sin() + torch.tensor(0.1).double() * expected)


@pytest.mark.parametrize("backbone", ["clip_vit_tiny", "swin3d_tiny"])
@pytest.mark.parametrize("targets", [("q", "v"), ("k",), ("v", "q", "k"), ("q", "q")])
def test_lora_merges_into_the_weights(backbone: str, targets: tuple[str, ...]) -> None:
    """W + (alpha / r) B A of the named projections, of a fused layer its named thirds."""
    made = model(backbone, ("lora", {"r": 2, "alpha": 5.0, "targets": targets}))
    fused, named = backbone == "swin3d_tiny", list(dict.fromkeys(targets))
    roles = {"qkv"} if fused else set(named)
    assert {name.split(".")[1] for name in made.sites} == roles
    merged = copy.deepcopy(made.backbone)
    detach(merged.net)
    for wrapper in made.sites.values():
        lora, weight = wrapper.adapters["a"], merged.net.get_submodule(wrapper.site.path).weight
        channels = weight.shape[1]
        assert sum(p.numel() for p in lora.parameters()) == len(lora.up) * 2 * 2 * channels
        for n, target in enumerate(named if fused else [wrapper.site.role]):
            first = "qkv".index(target) * channels if fused else 0
            weight[first : first + channels] += 5.0 / 2 * lora.up[n] @ lora.down[n]
    x = clips()
    assert_same(made.backbone(x), merged(x))
    bare = copy.deepcopy(made.backbone)
    detach(bare.net)
    assert not torch.allclose(bare(x), merged(x), atol=1e-3)


def library(made: MultiDomainModel, path: str) -> Any:
    return dict(library_modules(made.backbone.net))[path]


def at_site(made: MultiDomainModel, name: str, x: Tensor, grid: TokenGrid) -> Tensor:
    made.route.tokens = grid
    found: Tensor = made.sites[name](x)
    return found


def embedded(prefix: Any, reparam: str) -> Tensor:
    c: Tensor = prefix.prefix
    if reparam.startswith("mlp"):
        first, _, last = prefix.reparam
        hidden = c @ first.weight.T + first.bias
        return (hidden.tanh() if reparam == "mlp_tanh" else hidden.clamp(min=0)) @ last.weight.T + last.bias
    return c.clamp(min=0) if reparam == "relu" else c


@pytest.mark.parametrize("reparam", ["relu", "none", "mlp_relu", "mlp_tanh"])
@pytest.mark.parametrize(("gate", "lora"), [("softmax", False), ("softmax_zero", False), ("softmax_zero", True)])
def test_a_prefix_is_attention_over_joined_keys(reparam: str, gate: str, lora: bool) -> None:
    """Spec cm3t 2.3: (1 - g) Attn(q, K, V) + g Attn(q, [P_k; K], [P_v; V]); the prefix passes no bias, no LoRA."""
    entries: list[Entry] = [("prefix", {"length": 3, "gate": gate, "reparam": reparam})]
    made = model("clip_vit_tiny", *entries, *[("lora", {"targets": ("k", "v")})] * lora)
    prefix: Any = made.sites["block2.attn"].adapters["a"]
    for name in "qkv":
        nn.init.normal_(library(made, f"encoder.layers.1.self_attn.{name}_proj").bias)
    grid = TokenGrid(2, 2, 3, "frame")
    x, c = tokens(grid, channels=64), embedded(prefix, reparam)
    joined, own = {}, {}
    for name in "qkv":
        layer = library(made, f"encoder.layers.1.self_attn.{name}_proj")
        own[name] = x @ layer.weight.T + layer.bias
        if lora and name != "q":
            low: Any = made.sites[f"block2.{name}"].adapters["a"]
            own[name] += x @ (low.up[0] @ low.down[0]).T
        joined[name] = torch.cat([(c @ layer.weight.T).expand(len(x), -1, -1), own[name]], 1)

    def attention(k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 16)) for part in (own["q"], k, v))
        share = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 4).softmax(-1)
        return torch.einsum("bhnm,bmhd->bnhd", share, v).flatten(2)

    g = 1 if gate == "softmax" else prefix.gain.tanh()
    out = library(made, "encoder.layers.1.self_attn.out_proj")
    mixed = (1 - g) * attention(own["k"], own["v"]) + g * attention(joined["k"], joined["v"])
    assert_same(at_site(made, "block2.attn", x, grid), out(mixed))


@pytest.mark.parametrize("block", [1, 2])
def test_a_prefix_in_shifted_windows(block: int) -> None:
    """Every window sees the prefix, without position bias or mask; pairs of tokens are compared one by one."""
    made = model("swin3d_tiny", ("prefix", {"length": 3, "gate": "softmax"}))
    prefix: Any = made.sites[f"block{block}.attn"].adapters["a"]
    layer = library(made, f"features.0.{block - 1}.attn")
    nn.init.normal_(layer.relative_position_bias_table)
    nn.init.normal_(layer.qkv.bias)
    grid, window, shift = TokenGrid(3, 4, 4, "grid"), (2, 3, 3), (block - 1,) * 3
    x = tokens(grid, channels=32)
    padded = nn.functional.pad(x, (0, 0, 0, 2, 0, 2, 0, 1))
    size = padded.shape[1:4]
    place = torch.cartesian_prod(*(torch.arange(n) for n in size))
    rolled = (place - torch.tensor(shift)) % torch.tensor(size)
    region = torch.cat([rolled // torch.tensor(window), (place < torch.tensor(shift)).long()], 1)
    visible = (region[:, None] == region[None]).all(-1)
    step = (rolled[:, None] - rolled[None] + torch.tensor(window) - 1).clamp(min=0)
    row = ((step[..., 0] * 5 + step[..., 1]) * 5 + step[..., 2]).clamp(max=3 * 5 * 5 - 1)
    bias = layer.relative_position_bias_table[row].permute(2, 0, 1).masked_fill(~visible, -torch.inf)
    q, k, v = (part.unflatten(-1, (2, 16)) for part in layer.qkv(padded.flatten(1, 3)).chunk(3, -1))
    rows = (prefix.prefix.clamp(min=0) @ layer.qkv.weight[32:].T).chunk(2, -1)
    keys, values = (part.unflatten(-1, (2, 16)).expand(2, -1, -1, -1) for part in rows)
    own = torch.einsum("bnhd,bmhd->bhnm", q, k) / 4 + bias
    joined = torch.cat([torch.einsum("bnhd,blhd->bhnl", q, keys) / 4, own], -1).softmax(-1)
    y = torch.einsum("bhnm,bmhd->bnhd", joined, torch.cat([values, v], 1)).flatten(2)
    expected = layer.proj(y).unflatten(1, size)[:, :3, :4, :4]
    assert_same(at_site(made, f"block{block}.attn", x, grid), expected)


def test_prefix_and_tokens_share_one_normaliser() -> None:
    """Spec cm3t, property 7: a constant added to the prefix's logits alone changes the output."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 7, 6, dtype=torch.float64)
    keys, values = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    q[..., 0], k[..., 0], keys[..., 0] = 1, 0, 0  # what is put in here is added to all logits
    gate = torch.tensor(0.6, dtype=torch.float64)
    before = attend(q, k, v, None, Prefix(keys, values, gate))
    keys[..., 0] += 2
    assert (attend(q, k, v, None, Prefix(keys, values, gate)) - before).abs().min() > 1e-6
    k[..., 0] += 2
    assert_same(attend(q, k, v, None, Prefix(keys, values, gate)), before)


def test_how_a_prefix_starts_and_drops() -> None:
    method = ADAPTERS.load("prefix")
    site = Site("s", "s", "attention", "frame", 8, (1, 1, 1))
    made = method(site, method.Options(length=500)).requires_grad_(False)
    assert sum(p.numel() for p in made.parameters()) == 500 * 8 + 1
    assert made.gain == 0
    assert made.prefix.min() >= 0
    assert made.prefix.square().mean().sqrt() == pytest.approx(0.02, rel=0.1)
    seen: list[Tensor] = []
    made.train()(lambda x, prefix, gate: seen.append(prefix) or x, torch.zeros(1), TokenGrid(1, 1, 1, "frame"))
    assert (seen[0] == 0).float().mean() == pytest.approx(0.1, abs=0.02)
    kept = seen[0] != 0
    torch.testing.assert_close(seen[0][kept], (made.prefix / 0.9)[kept])


def test_the_literal_gate_does_not_start_as_the_bare_backbone() -> None:
    fresh = tiny_model("prefix", backbone="vivit_tiny", bn="frozen", options={"gate": "softmax"})
    bare = copy.deepcopy(fresh.backbone)
    detach(bare.net)
    assert not torch.allclose(fresh(clips(), "a"), fresh.heads["a"](bare(clips())[:, 0]), atol=1e-6)


@pytest.mark.parametrize("backbone", ["swin3d_tiny", "clip_vit_tiny", "mvit_tiny"])
def test_separate_keys_are_two_prefixes_and_gates_of_one_number_ignore_the_mass(backbone: str) -> None:
    """Spec cm3t 3.3."""
    frames = 8 if backbone == "mvit_tiny" else 4
    shared = model(backbone, ("prefix", {"length": 3, "gate": "softmax"}), num_frames=frames)
    options = {"length": 3, "keys": "separate"}
    separate = model(backbone, ("prefix", {**options, "gate": "softmax"}), num_frames=frames)
    gates = [{**options, "gate": gate, "gate_value": 0.25} for gate in ("fixed", "learned")]
    fixed, learned = (model(backbone, ("prefix", chosen), num_frames=frames) for chosen in gates)
    for other in (separate, fixed, learned):
        other.heads.load_state_dict(shared.heads.state_dict())
    x = clips(frames=frames)
    for site, wrapper in shared.sites.items():
        own: Any = wrapper.adapters["a"]
        for other in (separate, fixed, learned):
            theirs: Any = other.sites[site].adapters["a"]
            assert theirs.prefix.shape == (2, *own.prefix.shape)
            with torch.no_grad():
                theirs.prefix.copy_(own.prefix.expand(2, -1, -1))
    with torch.no_grad():
        torch.testing.assert_close(separate(x, "a"), shared(x, "a"), rtol=0, atol=1e-10)
        for wrapper in learned.sites.values():
            adapter: Any = wrapper.adapters["a"]
            adapter.gain.fill_(math.log(0.25 / 0.75))
        torch.testing.assert_close(learned(x, "a"), fixed(x, "a"), rtol=0, atol=1e-6)
        assert not torch.allclose(fixed(x, "a"), separate(x, "a"))
        first: Any = next(iter(separate.sites.values())).adapters["a"]
        before = separate(x, "a")
        first.prefix[1].add_(1)
        assert not torch.allclose(separate(x, "a"), before)
    method, site = ADAPTERS.load("prefix"), shared.sites[next(iter(shared.sites))].site
    assert float(method(site, method.Options(gate="learned")).gain) == -4
