"""Where token adapters go: layers, several at one site, and what is refused (spec mst_adapter 2.3, 7.9)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from mdltool.adapters import ADAPTERS
from mdltool.backbones import BACKBONES
from mdltool.backbones.transformer import Names, OpenBlock, block_places
from mdltool.errors import MdlError
from mdltool.model_spec import choose_sites
from mdltool.wrapping import TokenGrid
from tests.adapters.test_mst import shifted
from tests.adapters.test_token_adapters import Entry, assert_same, at_site, identity, model, tokens
from tests.models import clips, tiny_model

NAMES = Names("n1", "attn", "n2", "mlp", {"q": "q_proj", "k": "k_proj", "v": "v_proj"})
TWELVE = {name: place for n in range(1, 13) for name, place in block_places(f"b.{n}", n, NAMES).items()}


@pytest.mark.parametrize("kind", ["mhva", "adaptformer", "prefix", "st", "mst", "cls_shift", "lora"])
@pytest.mark.parametrize(
    ("layers", "expected"),
    [("1-4,9-12", [1, 2, 3, 4, 9, 10, 11, 12]), ("7", [7]), ("3, 5-6", [3, 5, 6]), (None, list(range(1, 13)))],
)
def test_layers_choose_blocks(kind: str, layers: str | None, expected: list[int]) -> None:
    method = ADAPTERS.load(kind)
    chosen = choose_sites("all", TWELVE, method, method.Options(layers=layers))
    assert sorted({TWELVE[name].layer for name in chosen}) == expected


@pytest.mark.parametrize("layers", ["", "0", "a", "4-1", "1-", "-3", "1,,2", "1-2-3", "1;2", "1-4,9-8"])
def test_faulty_layers_are_named(layers: str) -> None:
    with pytest.raises(MdlError, match=r"layers.*no list of blocks such as 1-4 or 1-4,9-12"):
        model("clip_vit_tiny", ("mst", {"layers": layers}))


@pytest.mark.parametrize("kind", ["mhva", "prefix", "st", "mst", "cls_shift", "lora"])
def test_blocks_outside_the_layers_are_the_librarys_own(kind: str) -> None:
    """Spec mst_adapter, property 9."""
    made = model("clip_vit_tiny", (kind, {"layers": "2"}))
    blocks = [made.backbone.net.get_submodule(f"encoder.layers.{n}") for n in range(3)]
    bare = tiny_model(None, backbone="clip_vit_tiny").backbone.net.get_submodule("encoder.layers.0")
    assert isinstance(blocks[1], OpenBlock)
    for block in (blocks[0], blocks[2]):
        assert type(block) is CLIPEncoderLayer
        assert [(n, type(m)) for n, m in block.named_modules()] == [(n, type(m)) for n, m in bare.named_modules()]


@pytest.mark.parametrize("backbone", ["clip_vit_tiny", "swin3d_tiny", "vivit_tiny"])
def test_prefix_and_mhva_at_one_attention_in_either_order(backbone: str) -> None:
    prefix, mhva = ("prefix", {"length": 3}), ("mhva", {"heads": 3, "r": 5, "at": "attn"})
    first, second = model(backbone, prefix, mhva), model(backbone, mhva, prefix)
    for name in [name for name in first.sites if "+" not in name]:
        second.sites[f"{name}+prefix"].adapters.load_state_dict(first.sites[name].adapters.state_dict())
        second.sites[name].adapters.load_state_dict(first.sites[f"{name}+mhva"].adapters.state_dict())
    x = clips()
    assert_same(first(x, "a"), second(x, "a"))
    grid = first.route.tokens
    assert grid is not None
    u = tokens(grid, channels=first.sites["block2.attn"].site.channels)
    added = first.sites["block2.attn+mhva"].adapters["a"](torch.zeros_like, u, grid)
    assert_same(at_site(first, "block2.attn+mhva", u, grid), at_site(first, "block2.attn", u, grid) + added)


def test_mst_and_shift_at_one_site_in_their_order() -> None:
    """Position prior_sub: S(A(LN1(V))), as listed."""
    mst: Entry = ("mst", {"r": 4, "position": "prior_sub"})
    made, turned = model("clip_vit_tiny", mst, ("cls_shift", {})), model("clip_vit_tiny", ("cls_shift", {}), mst)
    for name, wrapper in turned.sites.items():
        if wrapper.adapters["a"].state_dict():
            wrapper.adapters.load_state_dict(made.sites[name.removesuffix("+mst")].adapters.state_dict())
    grid = TokenGrid(3, 2, 2, "frame")
    x = tokens(grid, channels=64)
    own = made.sites["block1.attn_in"].adapters["a"]
    assert_same(at_site(made, "block1.attn_in+cls_shift", x, grid), shifted(own(identity, x, grid), 3, 16))
    assert_same(at_site(turned, "block1.attn_in+mst", x, grid), own(identity, shifted(x, 3, 16), grid))
    assert not torch.allclose(made(clips(), "a"), turned(clips(), "a"), atol=1e-4)


FAULTS: list[tuple[str, Entry, Any, str]] = [
    ("swin3d_tiny", ("cls_shift", {}), "all", "class token for each frame"),
    ("vivit_tiny", ("cls_shift", {}), "all", "class token for each frame"),
    ("x3d_tiny", ("mhva", {}), "all", "no site for .* attention or mlp"),
    ("clip_vit_tiny", ("2plus1d", {}), "all", "no site for .* stage"),
    ("clip_vit_tiny", ("mst", {"layers": "9-12"}), "all", "no site for"),
    ("clip_vit_tiny", ("st", {}), ["block1.mlp"], "of kind block, not mlp"),
    ("clip_vit_tiny", ("mst", {}), ["block1.mid", "block1.mid"], "already"),
    ("mvit_tiny", ("mhva", {}), ["block3.attn"], "changes the grid or the width"),
    ("clip_vit_tiny", ("mhva", {"chunk": "grid:0x2"}), "all", "chunk: "),
    ("clip_vit_tiny", ("mhva", {"heads": 0}), "all", "heads: "),
    ("clip_vit_tiny", ("prefix", {"length": 0}), "all", "length: "),
    ("clip_vit_tiny", ("cls_shift", {"fold_div": 1}), "all", "fold_div: "),
    ("clip_vit_tiny", ("mst", {"kernels": "2x2x2"}), "all", "kernels: "),
    ("clip_vit_tiny", ("lora", {"targets": ()}), "all", "targets: "),
]


@pytest.mark.parametrize(("backbone", "entry", "sites", "message"), FAULTS)
def test_faults_are_named(backbone: str, entry: Entry, sites: Any, message: str) -> None:
    factory = BACKBONES.load(backbone)
    shape = {"num_frames": factory.default_frames, "crop": factory.default_crop}
    with pytest.raises(MdlError, match=message) as caught:
        model(backbone, entry, sites=sites, **shape)
    assert caught.value.where
    assert caught.value.fix
