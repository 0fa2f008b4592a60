"""Multiscale transformers: MultiTrain's network against its equations, and the places of both families."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision.models.video.mvit import MViT

from mdltool.backbones import BACKBONES
from mdltool.backbones.base import Backbone
from mdltool.backbones.multiscale import multiscale_attention, pooled
from mdltool.backbones.mvit import block_settings
from mdltool.errors import MdlError
from mdltool.model import MultiDomainModel, build_model
from mdltool.model_spec import AdapterSpec, ModelSpec
from mdltool.stages.describe import gflops_per_view
from mdltool.wrapping import TokenGrid, detach, find

TINY = ("mvit_tiny", "multitrain_mvit_tiny")
ADAPTERS = ("mhva", "adaptformer", "st", "mst", "lora", "prefix")


def randomise(module: nn.Module) -> nn.Module:
    """Float64 in eval mode, seeded, every parameter away from zero and one."""
    module = module.double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module


def make(name: str, frames: int | None = None, crop: int | None = None, **options: Any) -> Backbone:
    factory = BACKBONES.load(name)
    backbone = factory(factory.Options(**options), frames or factory.default_frames, crop or factory.default_crop)
    randomise(backbone)
    return backbone


def on_meta(name: str, **changes: Any) -> Backbone:
    factory = BACKBONES.load(name)
    shape = {"num_frames": factory.default_frames, "crop": factory.default_crop} | changes
    with torch.device("meta"):
        backbone: Backbone = factory(factory.Options(), **shape)
    return backbone


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clips(backbone: Backbone) -> torch.Tensor:
    return noise(2, 3, backbone.num_frames, backbone.crop, backbone.crop)


# MultiTrain's block by the equations of spec 2.1, on [C, T, H, W] of one clip and one head at a time


def normed(x_NC: torch.Tensor, layer: nn.LayerNorm, eps: float) -> torch.Tensor:
    centred = x_NC - x_NC.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * layer.weight + layer.bias


def pool_by_hand(x_DTHW: torch.Tensor, pool: Any, stride: int) -> torch.Tensor:
    """A depthwise 3x3x3 convolution and LN(1e-5): tokens [N, D]."""
    y = functional.conv3d(x_DTHW[None], pool.pool.weight, stride=(1, stride, stride), padding=1, groups=len(x_DTHW))
    return normed(y[0].flatten(1).T, pool.norm_act[0], 1e-5)


def attention_by_hand(
    attn: Any, tokens_NC: torch.Tensor, size: Any, q_stride: int, kv_stride: int, prefix: Any = None
) -> torch.Tensor:
    """Tokens [N, C] of one clip; prefix tokens [L, C] join keys and values past the convolution."""
    width = attn.qkv.out_features // 3 // attn.num_heads
    outputs = []
    for head in range(attn.num_heads):
        three, joined = [], []
        for part, stride, name in ((0, q_stride, "pool_q"), (1, kv_stride, "pool_k"), (2, kv_stride, "pool_v")):
            rows = slice((part * attn.num_heads + head) * width, (part * attn.num_heads + head + 1) * width)
            projected = tokens_NC @ attn.qkv.weight[rows].T + attn.qkv.bias[rows]
            pool = getattr(attn, name)
            three.append(pool_by_hand(projected.T.reshape(width, *size), pool, stride))
            if prefix is not None and part:
                joined.append(normed(prefix @ attn.qkv.weight[rows].T, pool.norm_act[0], 1e-5))
        q, k, v = three
        if joined:
            k, v = torch.cat([k, joined[0]]), torch.cat([v, joined[1]])
        outputs.append((q @ k.T / width**0.5).softmax(-1) @ v + q)
    return torch.cat(outputs, 1) @ attn.project[0].weight.T + attn.project[0].bias


def block_by_hand(block: Any, x_CTHW: torch.Tensor, q_stride: int, kv_stride: int) -> torch.Tensor:
    size = x_CTHW.shape[1:]
    tokens = x_CTHW.flatten(1).T
    y = attention_by_hand(block.attn, normed(tokens, block.norm1, 1e-6), size, q_stride, kv_stride)
    skip = tokens
    if block.project is not None:  # of X itself, not of LN(X)
        skip = tokens @ block.project.weight.T + block.project.bias
    skip = skip.T.reshape(-1, *size)
    if q_stride == 2:
        skip = functional.max_pool3d(skip, (1, 3, 3), (1, 2, 2), (0, 1, 1))
    x = skip.flatten(1).T + y
    hidden = functional.gelu(normed(x, block.norm2, 1e-6) @ block.mlp[0].weight.T + block.mlp[0].bias)
    x = x + hidden @ block.mlp[3].weight.T + block.mlp[3].bias
    return x.T.reshape(-1, *skip.shape[1:])


@pytest.mark.parametrize(("number", "q_stride", "kv_stride"), [(0, 1, 8), (2, 2, 4), (3, 1, 4), (21, 2, 1)])
def test_multitrains_blocks_are_its_equations(number: int, q_stride: int, kv_stride: int) -> None:
    block: Any = on_meta("multitrain_mvit_b").net.blocks[number].to_empty(device="cpu")
    randomise(block)
    x = noise(2, 2, 8, 7, block.norm1.normalized_shape[0])
    y, size = block(x, (2, 8, 7))
    assert size == (2, 8 // q_stride, -(-7 // q_stride)) == y.shape[1:4]
    for own, out in zip(x, y, strict=True):
        expected = block_by_hand(block, own.movedim(-1, 0), q_stride, kv_stride).movedim(0, -1)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_multitrains_network_is_its_equations() -> None:
    backbone = make("multitrain_mvit_tiny")
    net: Any = backbone.net
    x = clips(backbone)
    encoding = net.pos_encoding
    for own, feature in zip(x, backbone(x), strict=True):
        y = functional.conv3d(own[None], net.conv_proj.weight, net.conv_proj.bias, (2, 4, 4), (1, 3, 3))[0]
        for t in range(4):
            for row in range(8):
                for column in range(8):
                    y[:, t, row, column] += encoding.spatial_pos[8 * row + column] + encoding.temporal_pos[t]
        for block, q_stride, kv_stride in zip(net.blocks, (1, 1, 2, 1), (4, 4, 2, 2), strict=True):
            y = block_by_hand(block, y, q_stride, kv_stride)
        expected = normed(y.flatten(1).T, net.norm, 1e-6).mean(0)
        torch.testing.assert_close(feature[0], expected, rtol=1e-9, atol=1e-9)


def test_multitrains_grids_widths_and_norms() -> None:
    """Spec 2.1: strides of queries and keys, always on the block's input grid; LN 1e-5 in the attention."""
    backbone = on_meta("multitrain_mvit_b")
    net: Any = backbone.net
    grid = TokenGrid(16, 56, 56, "grid")
    for number, block in enumerate(net.blocks):
        stage = sum(number >= first for first in (2, 5, 21))
        moves = number in (2, 5, 21)
        width, side = 96 * 2**stage, 56 // 2**stage
        attn = block.attn
        assert (attn.num_heads, attn.output_dim, attn.head_dim) == (2**stage, width, 96)
        assert attn.embed_dim == block.norm1.normalized_shape[0] == (width // 2 if moves else width)
        x = torch.empty(1, 16, grid.height, grid.width, 96, device="meta")
        keys = {pooled(pool, x, grid)[1] for pool in (attn.pool_k, attn.pool_v)}
        assert keys == {TokenGrid(16, 14, 14, "grid") if moves else TokenGrid(16, 7, 7, "grid")}
        grid = pooled(attn.pool_q, x, grid)[1]
        assert grid == TokenGrid(16, side, side, "grid")
        assert {pool.norm_act[0].eps for pool in (attn.pool_q, attn.pool_k, attn.pool_v)} == {1e-5}
        assert block.norm1.eps == block.norm2.eps == net.norm.eps == 1e-6
        assert block.stochastic_depth.p == pytest.approx(0.1 * number / 23)
    assert (grid.height, backbone.feature_dim) == (7, 768)


def test_multitrains_initialisation() -> None:
    torch.manual_seed(0)
    factory = BACKBONES.load("multitrain_mvit_tiny")
    net = factory(factory.Options(), 8, 32).net
    for module in net.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert not module.bias.any()
    for table in (net.pos_encoding.spatial_pos, net.pos_encoding.temporal_pos):
        assert table.std().item() == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize(
    ("name", "crop", "backbone", "with_head", "gflops"),
    [
        ("multitrain_mvit_b", 224, 50_986_176, 51_293_776, 223.13),
        ("multitrain_mvit_b", 312, 51_269_184, 51_576_784, 612.40),
        ("mvit_v2_s", 224, 34_230_144, 34_537_744, 64.224),
    ],
)
def test_published_counts(name: str, crop: int, backbone: int, with_head: int, gflops: float) -> None:
    spec = ModelSpec(name, {}, BACKBONES.load(name).default_frames, crop, {"a": 400}, [])
    with torch.device("meta"):
        model = build_model(spec)
    counts = model.parameter_counts()
    assert (counts["backbone"], counts["total"]) == (backbone, with_head)
    assert gflops_per_view(model, spec) == pytest.approx(gflops, abs=0.01)


def test_the_features_are_the_librarys_class_token() -> None:
    backbone = make("mvit_tiny")
    reference = MViT(
        (32, 32),
        8,
        block_settings(4, 32, (2,), 4),
        residual_pool=True,
        residual_with_cls_embed=False,
        rel_pos_embed=True,
        proj_after_attn=True,
    )
    reference.head = nn.Identity()
    reference.double().eval().load_state_dict(backbone.net.state_dict())
    torch.testing.assert_close(backbone(clips(backbone))[:, 0], reference(clips(backbone)), rtol=0, atol=1e-10)
    assert set(on_meta("mvit_v2_s").classifier) == {"head.1.weight", "head.1.bias"}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(("frames", "crop"), [(8, 32), (6, 40), (2, 36)])
def test_an_opened_block_is_the_librarys(name: str, frames: int, crop: int) -> None:
    backbone = make(name, frames, crop, interpolate=True)
    keys, expected = list(backbone.net.state_dict()), backbone(clips(backbone))
    backbone.open_blocks(backbone.block_paths())
    torch.testing.assert_close(backbone(clips(backbone)), expected, rtol=0, atol=1e-10)
    detach(backbone.net)
    assert list(backbone.net.state_dict()) == keys
    assert torch.equal(backbone(clips(backbone)), expected)


@pytest.mark.parametrize("name", TINY)
def test_stochastic_depth_is_inside_the_opened_branches(name: str) -> None:
    backbone = make(name, drop_path=0.5)
    block, x = backbone.net.get_submodule("blocks.2"), noise(4, 2, 4, 4, 32)
    if name == "mvit_tiny":
        x = noise(4, 33, 32)
    opened = backbone.open_block(copy.deepcopy(block)).train()
    torch.manual_seed(3)
    expected = block.train()(x, (2, 4, 4))[0]
    torch.manual_seed(3)
    torch.testing.assert_close(opened(x, (2, 4, 4))[0], expected, rtol=0, atol=1e-10)
    assert not torch.allclose(block.eval()(x, (2, 4, 4))[0], expected)


class Spy(nn.Module):
    """Checks that the route's grid is the grid of the tokens that pass."""

    def __init__(self, backbone: Backbone, seen: list[tuple[Any, int]]) -> None:
        super().__init__()
        self.backbone, self.seen = [backbone], seen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = self.backbone[0].route.tokens
        assert grid is not None
        class_BTC, patches = grid.split(x)
        assert patches.shape == (len(x), grid.frames, grid.height, grid.width, x.shape[-1])
        assert torch.equal(grid.join(class_BTC, patches), x)
        self.seen.append(((grid.frames, grid.height, grid.width), x.shape[-1]))
        return x


@pytest.mark.parametrize("name", TINY)
def test_every_place_sees_its_own_grid_and_the_sites_say_so(name: str) -> None:
    backbone = make(name)
    sites = backbone.sites()
    old, new = ((4, 8, 8), 32), ((4, 4, 4), 64)
    for site in sites.values():
        after = site.layer == 4 or (
            site.layer == 3 and site.role in ("attn_out", "mid", "norm2_in", "mlp_in", "mlp", "mlp_out", "exit")
        )
        assert (site.grid, site.channels) == (new if after else old), site.name
    assert {site.layout for site in sites.values()} == {"clip" if name == "mvit_tiny" else "grid"}
    qkv = sites["block3.qkv"]
    assert qkv.shape is not None
    assert (qkv.shape.out_channels, qkv.shape.parts) == (192, 3)
    assert sites["block3.attn"].role == "attn_pool"

    backbone.open_blocks(backbone.block_paths())
    for site in sites.values():
        if site.kind == "block":
            seen: list[tuple[Any, int]] = []
            block, role = site.path.rsplit(".", 1)
            find(backbone.net, block).owned()[role] = Spy(backbone, seen)  # type: ignore[operator, index]
            backbone(clips(backbone))
            assert seen == [(site.grid, site.channels)]


@pytest.mark.parametrize("name", TINY)
def test_the_patch_convolution_is_a_site(name: str) -> None:
    backbone = make(name)
    backbone(clips(backbone))  # what an earlier forward left in the route must not matter
    site = backbone.sites(("conv_proj",))["conv_proj"]
    assert (site.layout, site.channels, site.grid) == ("BCTHW", 3, (4, 8, 8))


def model_with(adapter: str, backbone: str, **options: Any) -> MultiDomainModel:
    factory = BACKBONES.load(backbone)
    frames, crop = factory.default_frames, factory.default_crop
    entry = AdapterSpec(adapter, options.pop("sites", "all"), options)
    torch.manual_seed(0)
    model = build_model(ModelSpec(backbone, {}, frames, crop, {"a": 3, "b": 2}, [entry], dropout=0.0)).double()
    model.apply_regime("frozen")
    return model.eval()


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_start_as_the_bare_network_learn_and_come_off(adapter: str, name: str) -> None:
    # After the last attention a class-token readout gives patch tokens no gradient.
    model = model_with(adapter, name, **({"layers": "1-3"} if name == "mvit_tiny" else {}))
    bare = copy.deepcopy(model.backbone)
    detach(bare.net)
    x = clips(model.backbone)
    torch.testing.assert_close(model(x, "a"), model.heads["a"](bare(x)).mean(1), rtol=0, atol=1e-10)

    own = [p for site in model.sites.values() for p in site.adapters["a"].parameters()]
    optimizer = torch.optim.SGD([*own, *model.heads["a"].parameters()], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(model(x, "a"), torch.tensor([0, 2])).backward()
        optimizer.step()
    for site, wrapper in model.sites.items():
        for key, parameter in wrapper.adapters["a"].named_parameters():
            assert parameter.grad is not None, (site, key)
            assert parameter.grad.abs().sum() > 0, (site, key)
    assert not torch.allclose(model(x, "a"), model.heads["a"](bare(x)).mean(1))
    torch.testing.assert_close(model(x, "b"), model.heads["b"](bare(x)).mean(1), rtol=0, atol=1e-10)

    library = model.backbone.net
    detach(library)
    assert list(library.state_dict()) == list(bare.net.state_dict())
    assert torch.equal(model.backbone(x), bare(x))


@pytest.mark.parametrize("name", TINY)
def test_prefixes_go_everywhere_and_adapters_beside_attention_where_the_shape_is_kept(name: str) -> None:
    model = model_with("prefix", name)
    assert [site.site.channels for site in model.sites.values()] == [32, 32, 32, 64]
    beside = model_with("mhva", name, at="both")
    assert {site for site in beside.sites if site.endswith("attn")} == {"block1.attn", "block2.attn", "block4.attn"}
    assert beside(clips(beside.backbone), "a").shape == (2, 3)
    with pytest.raises(MdlError, match="changes the grid"):
        model_with("mhva", name, sites=["block3.attn"])


def test_a_prefix_joins_keys_and_values_past_the_pooling_convolution() -> None:
    backbone = make("multitrain_mvit_tiny")
    for number, size, q_stride, kv_stride in ((0, (2, 8, 8), 1, 4), (2, (2, 8, 8), 2, 2)):
        attn: Any = backbone.net.get_submodule(f"blocks.{number}.attn")
        x, prefix = noise(1, *size, 32), noise(5, 32, seed=2)
        grid = TokenGrid.of(size, "grid")
        y = multiscale_attention(attn, x, grid, prefix, torch.ones((), dtype=torch.float64))
        expected = attention_by_hand(attn, x[0].flatten(0, 2), size, q_stride, kv_stride, prefix)
        torch.testing.assert_close(y[0].flatten(0, 2), expected, rtol=1e-10, atol=1e-10)
        none = multiscale_attention(attn, x, grid, prefix, torch.zeros((), dtype=torch.float64))
        torch.testing.assert_close(none, multiscale_attention(attn, x, grid), rtol=0, atol=1e-10)


def test_other_clip_shapes_are_refused_or_fitted() -> None:
    with pytest.raises(MdlError, match="do not divide"):
        make("multitrain_mvit_tiny", 8, 38)
    with pytest.raises(MdlError, match="do not divide"):
        make("multitrain_mvit_tiny", 7, 32)
    for name in TINY:
        with pytest.raises(MdlError, match="positions are for a grid"):
            make(name)(noise(1, 3, 8, 40, 40))
    assert make("mvit_tiny", interpolate=True)(noise(1, 3, 5, 40, 28)).shape == (1, 1, 64)

    small, large = make("multitrain_mvit_tiny"), make("multitrain_mvit_tiny", crop=40, interpolate=True)
    table: Any = small.net.get_submodule("pos_encoding").spatial_pos
    with torch.no_grad():  # rises along the width only
        table.copy_(torch.arange(8).repeat(8)[:, None].expand(64, 32))
    with pytest.raises(MdlError, match="spatial_pos: shape"):
        make("multitrain_mvit_tiny", crop=40).load_library_state(small.library_state(), "test")
    large.load_library_state(small.library_state(), "test")
    fitted: Any = large.net.get_submodule("pos_encoding").spatial_pos
    fitted_HWC = fitted.detach().unflatten(0, (10, 10))
    torch.testing.assert_close(fitted_HWC, fitted_HWC[:1, :, :1].expand(10, 10, 32), rtol=0, atol=1e-5)
    slope = (torch.arange(10).double() + 0.5) * 0.8 - 0.5
    torch.testing.assert_close(fitted_HWC[5, 2:8, 0], slope[2:8], rtol=0, atol=0.05)  # torch's cubic wavers so far
    small.load_library_state(small.library_state(), "test")
