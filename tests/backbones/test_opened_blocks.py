"""Opened blocks are the library's own blocks, number for number, and give them back."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.video.swin_transformer import SwinTransformer3d

from mdltool.backbones import BACKBONES
from mdltool.backbones.base import Backbone
from mdltool.backbones.transformer import TAPS, OpenBlock, Prefix, attend
from mdltool.errors import MdlError
from mdltool.wrapping import TokenGrid, detach, find

TINY = ("clip_vit_tiny", "vit_tiny", "vivit_tiny", "swin3d_tiny")


def make(name: str, frames: int | None = None, crop: int | None = None, **options: object) -> Backbone:
    """A seeded backbone in float64 whose weights are all away from zero and one."""
    factory = BACKBONES.load(name)
    torch.manual_seed(0)
    backbone: Backbone = factory(
        factory.Options(**options), frames or factory.default_frames, crop or factory.default_crop
    )
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.2)
    return backbone.double().eval()


def clip(backbone: Backbone, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, 3, backbone.num_frames, backbone.crop, backbone.crop)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", TINY)
def test_an_opened_block_is_the_librarys(name: str) -> None:
    backbone = make(name)
    x, keys = clip(backbone), list(backbone.net.state_dict())
    expected = backbone(x)
    backbone.open_blocks(backbone.block_paths())
    assert all(isinstance(backbone.net.get_submodule(path), OpenBlock) for path in backbone.block_paths())
    torch.testing.assert_close(backbone(x), expected, rtol=0, atol=1e-10)
    detach(backbone.net)
    assert list(backbone.net.state_dict()) == keys
    assert torch.equal(backbone(x), expected)


@pytest.mark.parametrize(
    ("frames", "height", "width"),
    [(8, 32, 32), (7, 100, 90), (1, 33, 40), (9, 64, 64), (3, 20, 20), (16, 48, 16), (32, 24, 56)],
)
def test_windows_that_shift_pad_and_shrink(frames: int, height: int, width: int) -> None:
    """Blocks with and without shift, windows larger than the map, odd frame counts, grids that need padding."""
    backbone = make("swin3d_tiny", frames)
    x = torch.randn(2, 3, frames, height, width, dtype=torch.float64)
    expected = backbone(x)
    backbone.open_blocks(backbone.block_paths())
    torch.testing.assert_close(backbone(x), expected, rtol=0, atol=1e-10)


def test_the_backbones_features_are_the_librarys_own() -> None:
    backbone = make("swin3d_tiny")
    reference = SwinTransformer3d([2, 4, 4], 32, [2, 2], [2, 4], [2, 3, 3]).double().eval()
    reference.head = nn.Identity()
    reference.load_state_dict(backbone.net.state_dict())
    torch.testing.assert_close(backbone(clip(backbone))[:, 0], reference(clip(backbone)), rtol=0, atol=1e-12)
    for name in ("clip_vit_tiny", "vit_tiny"):
        backbone = make(name)
        frames = clip(backbone).transpose(1, 2).flatten(0, 1)
        out = backbone.net(pixel_values=frames)
        first = out.pooler_output if name == "clip_vit_tiny" else out.last_hidden_state[:, 0]
        expected = first.unflatten(0, (2, -1)).mean(1)
        torch.testing.assert_close(backbone(clip(backbone))[:, 0], expected, rtol=0, atol=1e-12)
    backbone = make("vivit_tiny")
    out = backbone.net(pixel_values=clip(backbone).transpose(1, 2))
    torch.testing.assert_close(backbone(clip(backbone))[:, 0], out.last_hidden_state[:, 0], rtol=0, atol=1e-12)


def test_what_the_heads_read() -> None:
    backbone = make("clip_vit_tiny")
    net, tokens = backbone.net, []
    net.get_submodule("encoder.layers.2").register_forward_hook(lambda module, args, y: tokens.append(y))
    for pool, expected in (
        ("norm_mean", lambda t: net.post_layernorm(t[:, :, 0]).mean(1)),
        ("mean_norm", lambda t: net.post_layernorm(t[:, :, 0].mean(1))),
        ("mean_tokens", lambda t: net.post_layernorm(t).mean((1, 2))),
    ):
        backbone.options = type(backbone.options)(pool=pool)
        got = backbone(clip(backbone))[:, 0]
        wanted = expected(tokens[-1].unflatten(0, (2, -1)))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["clip_vit_tiny", "vit_tiny", "vivit_tiny"])
def test_other_sizes_are_refused_unless_interpolated(name: str) -> None:
    backbone = make(name)
    x = torch.randn(1, 3, 4, 48, 40, dtype=torch.float64)
    with pytest.raises(MdlError, match="position"):
        backbone(x)
    backbone = make(name, interpolate=True)
    assert backbone(x).shape == (1, 1, 64)
    assert (backbone.route.tokens.height, backbone.route.tokens.width) == (6, 5)


@pytest.mark.parametrize("name", TINY)
def test_sites_have_the_shapes_that_pass(name: str) -> None:
    backbone = make(name)
    sites = backbone.sites()
    assert set(sites) == set(backbone.places())
    layout = {"clip_vit_tiny": "frame", "vit_tiny": "frame", "vivit_tiny": "clip", "swin3d_tiny": "grid"}[name]
    assert {site.layout for site in sites.values()} == {layout}
    assert {role for site in sites.values() for role in [site.role]} >= set(TAPS) | {"attn", "mlp"}
    if name == "swin3d_tiny":
        assert (sites["block1.mid"].channels, sites["block1.mid"].grid) == (32, (4, 8, 8))
        assert (sites["block4.mid"].channels, sites["block4.mid"].grid) == (64, (4, 4, 4))
        assert sites["block4.attn"].window == (2, 3, 3)
        assert sites["block4.qkv"].shape.parts == 3
    else:
        frames = 2 if name == "vivit_tiny" else 4
        assert sites["block2.exit"].grid == (frames, 4, 4)
        assert sites["block2.q"].shape.out_channels == 64


def test_grids_split_and_join() -> None:
    x = torch.randn(6, 1 + 20, 5)
    grid = TokenGrid(3, 4, 5, "frame")
    first, patches = grid.split(x)
    assert first is not None
    assert (tuple(first.shape), tuple(patches.shape)) == ((2, 3, 5), (2, 3, 4, 5, 5))
    assert torch.equal(patches[1, 2, 3, 4], x[5, 1 + 3 * 5 + 4])
    assert torch.equal(grid.join(first, patches), x)
    x = torch.randn(2, 1 + 60, 5)
    grid = TokenGrid(3, 4, 5, "clip")
    first, patches = grid.split(x)
    assert first is not None
    assert first.shape == (2, 1, 5)
    assert torch.equal(patches[1, 2, 3, 4], x[1, 1 + 2 * 20 + 3 * 5 + 4])
    assert torch.equal(grid.join(first, patches), x)


def joined(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Attention written out."""
    logits = torch.einsum("bhnd,bhmd->bhnm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhnm,bhmd->bhnd", (logits if bias is None else logits + bias).softmax(-1), v)


@pytest.mark.parametrize("biased", [False, True])
def test_a_prefix_with_gate_one_is_attention_over_the_joined_keys(biased: bool) -> None:
    """Spec cm3t, property 7."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 7, 6, dtype=torch.float64)
    keys, values = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    bias = torch.randn(1, 4, 7, 7, dtype=torch.float64) if biased else None
    own, both = attend(q, k, v, bias, None), attend(q, k, v, bias, Prefix(keys, values, torch.ones(())))
    all_keys, all_values = (torch.cat([p.expand(2, -1, -1, -1), t], 2) for p, t in ((keys, k), (values, v)))
    padded = None if bias is None else nn.functional.pad(bias, (5, 0))
    torch.testing.assert_close(own, joined(q, k, v, bias), rtol=0, atol=1e-12)
    torch.testing.assert_close(both, joined(q, all_keys, all_values, padded), rtol=0, atol=1e-12)
    for gate in (0.0, 0.3):
        mixed = attend(q, k, v, bias, Prefix(keys, values, torch.tensor(gate, dtype=torch.float64)))
        torch.testing.assert_close(mixed, (1 - gate) * own + gate * both, rtol=0, atol=1e-12)
        constant = attend(q, k, v, bias, Prefix(keys, values, torch.ones(()), torch.tensor(gate)))
        alone = joined(q, keys.expand(2, -1, -1, -1), values.expand(2, -1, -1, -1), None)
        torch.testing.assert_close(constant, (1 - gate) * own + gate * alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", TINY)
def test_a_prefix_reaches_every_token_without_the_projections_biases(name: str) -> None:
    """Through the restated attention: as one more token whose key and value carry no bias, position or mask."""
    backbone = make(name)
    backbone.open_blocks(backbone.block_paths())
    attention, site = find(backbone.net, backbone.places()["block2.attn"].path), backbone.sites()["block2.attn"]
    shape = (2, 4, 8, 8, 32) if site.layout == "grid" else (2, 9, site.channels)
    x = torch.randn(shape, dtype=torch.float64)
    prefix = torch.randn(3, site.channels, dtype=torch.float64)
    assert torch.allclose(attention(x, prefix, torch.zeros(())), attention(x), rtol=0, atol=1e-12)
    changed = attention(x, prefix, torch.ones(())) - attention(x)
    assert (changed.abs().amax(-1) > 1e-6).all()
