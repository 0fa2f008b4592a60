"""Published checkpoint layouts, written by the libraries' own random models or by restatements of the originals."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    VivitConfig,
    VivitForVideoClassification,
)

from mdltool.backbones.image_transformer import ClipTiny, VitTiny
from mdltool.backbones.vivit import VivitTiny
from mdltool.errors import MdlError
from mdltool.stages.weights import import_weights
from tests.backbones.published import OpenAiVision, clip_of, fresh, imported, randomize

# PyTorchVideo and torchvision: the library's own keys, wrapped or not


@pytest.mark.parametrize("name", ["x3d_tiny", "swin3d_tiny"])
@pytest.mark.parametrize("form", ["model_state", "bare", "data_parallel", "safetensors", "legacy"])
def test_library_keys(name: str, form: str, tmp_path: Path) -> None:
    theirs = fresh(name)
    state = theirs.library_state()
    file = tmp_path / "weights.bin"  # the name says nothing
    if form == "safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, file)
    elif form == "data_parallel":
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, file)
    else:
        content = {"model_state": state, "cfg": "text"} if form == "model_state" else state
        torch.save(content, file, _use_new_zipfile_serialization=form != "legacy")
    ours = imported(name, file, tmp_path)
    x = clip_of(ours)
    assert torch.equal(ours(x), theirs(x))
    assert all(torch.equal(ours.classifier[key], theirs.classifier[key]) for key in theirs.classifier)


# transformers


def of_frames(model: Any, x: Tensor) -> Tensor:
    """The mean over frames of a picture model's normalised class tokens."""
    tokens = model(x.transpose(1, 2).flatten(0, 1)).last_hidden_state[:, 0]
    return tokens.unflatten(0, (len(x), -1)).mean(1, keepdim=True)


def of_clip(model: Any, x: Tensor) -> Tensor:
    pooled = model(x.transpose(1, 2).flatten(0, 1)).pooler_output
    return pooled.unflatten(0, (len(x), -1)).mean(1, keepdim=True)


def make_clip() -> Any:
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config=ClipTiny.config, text_config=text | {"vocab_size": 49408}, projection_dim=32)
    return CLIPModel(config)


TRANSFORMERS = {
    "clip": ("clip_vit_tiny", make_clip, lambda model, x: of_clip(model.vision_model, x)),
    "clip_vision": ("clip_vit_tiny", lambda: CLIPVisionModel(CLIPVisionConfig(**ClipTiny.config)), of_clip),
    "clip_projection": (
        "clip_vit_tiny",
        lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**ClipTiny.config)),
        lambda model, x: of_clip(model.vision_model, x),
    ),
    "vit": (
        "vit_tiny",
        lambda: ViTForImageClassification(ViTConfig(**VitTiny.config)),
        lambda model, x: of_frames(model.vit, x),
    ),
    "vit_bare": ("vit_tiny", lambda: ViTModel(ViTConfig(**VitTiny.config)), of_frames),
    "vivit": (
        "vivit_tiny",
        lambda: VivitForVideoClassification(VivitConfig(**VivitTiny.config)),
        lambda model, x: model.vivit(x.transpose(1, 2)).last_hidden_state[:, :1],
    ),
}


@pytest.mark.parametrize("form", ["saved", "sharded", "bin", "own_keys"])
@pytest.mark.parametrize("case", TRANSFORMERS)
def test_transformers(case: str, form: str, tmp_path: Path) -> None:
    name, make, features = TRANSFORMERS[case]
    model = randomize(make())
    folder = tmp_path / "downloaded"
    model.save_pretrained(folder, max_shard_size="100KB" if form == "sharded" else "5GB")
    if form == "sharded":
        assert len(list(folder.glob("*.safetensors"))) > 1
    if form == "bin":  # as older checkpoints: a pickle, with buffers that are no weights any more
        state = load_file(folder / "model.safetensors")
        if case.startswith("clip"):
            prefix = "" if case == "clip_vision" else "vision_model."
            state[f"{prefix}embeddings.position_ids"] = torch.arange(17)[None]
        torch.save(state, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    path = folder
    if form == "own_keys":  # the keys that transformers 5 has in memory, in a file alone
        path = tmp_path / "state.pth"
        torch.save(model.state_dict(), path)
    ours = imported(name, path, tmp_path)
    x = clip_of(ours)
    torch.testing.assert_close(ours(x), features(model, x), rtol=1e-4, atol=1e-5)


def vit_folder(folder: Path) -> Path:
    ViTModel(ViTConfig(**VitTiny.config)).save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("shard", ("a shard is missing", "model-00002")),
        ("outside", ("names a file elsewhere", "../other")),
        ("garbled", ("cannot be read", "index")),
        ("empty", ("holds no weights", "model.safetensors")),
        ("heads", ("num_attention_heads: 2, 4 expected", "config.json")),
    ],
)
def test_faulty_directory(spoil: str, words: tuple[str, ...], tmp_path: Path) -> None:
    folder = vit_folder(tmp_path / "vit")
    index = folder / "model.safetensors.index.json"
    if spoil == "shard":
        next(folder.glob("model-00002*")).unlink()
    elif spoil == "outside":
        index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    elif spoil == "garbled":
        index.write_text("{")
    elif spoil == "empty":
        for file in folder.glob("model*"):
            file.unlink()
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 2}))
    with pytest.raises(MdlError) as caught:
        import_weights("vit_tiny", folder, tmp_path / "made", tag="test")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "made.partial").exists()


# OpenAI's CLIP: a restatement of its vision transformer, whose module names give the layout


@pytest.mark.parametrize("form", ["whole", "visual", "half"])
def test_openai_clip(form: str, tmp_path: Path) -> None:
    theirs = randomize(OpenAiVision(64, 3, 4, 8, 32))
    if form == "half":
        theirs = theirs.half().float()
    state = theirs.state_dict()
    if form != "visual":
        text = nn.TransformerEncoderLayer(16, 2).state_dict()
        state = {f"visual.{key}": value for key, value in state.items()}
        state |= {f"transformer.resblocks.0.attn.{key}": value for key, value in text.items()}
        state |= {"logit_scale": torch.tensor(4.6), "token_embedding.weight": torch.zeros(9, 16)}
        state |= {"text_projection": torch.zeros(16, 32), "positional_embedding": torch.zeros(7, 16)}
        state |= {"input_resolution": torch.tensor(32), "context_length": torch.tensor(7)}
    if form == "half":
        state = {key: value.half() for key, value in state.items()}
    torch.save(state, tmp_path / "ViT.pt")
    ours = imported("clip_vit_tiny", tmp_path / "ViT.pt", tmp_path)
    x = clip_of(ours)
    frames = theirs(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1))
    torch.testing.assert_close(ours(x), frames.mean(1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert next(ours.parameters()).dtype == torch.float32


# Video Swin of its authors and of mmaction2


def swin_release(state: dict[str, Tensor], stages: int, last_norm: str, prefix: str) -> dict[str, Tensor]:
    """torchvision's keys in the words of the original, by string surgery of its own."""
    found = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "features":
            stage, odd = divmod(int(parts[1]), 2)
            parts[:2] = ["layers", str(stage), "downsample"] if odd else ["layers", str(stage), "blocks"]
            if "mlp" in parts:
                at = parts.index("mlp") + 1
                parts[at] = {"0": "fc1", "3": "fc2"}[parts[at]]
        elif parts[0] == "norm":
            parts[0] = last_norm
        head = parts[0] == "head"
        found["cls_head.fc_cls." + parts[1] if head else prefix + ".".join(parts)] = value
    return found


@pytest.mark.parametrize("form", ["authors", "mmaction2", "backbone_alone", "without_index"])
def test_video_swin(form: str, tmp_path: Path) -> None:
    theirs = fresh("swin3d_tiny")
    theirs.classifier = {"head.weight": torch.randn(400, 64), "head.bias": torch.randn(400)}
    norm = "norm3" if form == "mmaction2" else "norm"
    prefix = "" if form == "backbone_alone" else "backbone."
    state = swin_release(theirs.library_state(), 2, norm, prefix)
    if form == "without_index":
        state = {key: value for key, value in state.items() if "index" not in key}
    torch.save({"meta": {"epoch": 30, "CLASSES": None}, "state_dict": state}, tmp_path / "swin.pth")
    ours = imported("swin3d_tiny", tmp_path / "swin.pth", tmp_path)
    x = clip_of(ours)
    assert torch.equal(ours(x), theirs(x))
    assert all(torch.equal(ours.classifier[key], value) for key, value in theirs.classifier.items())


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_patch_merging_takes_the_originals_order(size: tuple[int, int], tmp_path: Path) -> None:
    """The original's rule, place by place: (0,0), (1,0), (0,1), (1,1) of each square, then LayerNorm, linear."""
    width, (height, breadth) = 32, size
    theirs = fresh("swin3d_tiny")
    state = swin_release(theirs.library_state(), 2, "norm", "backbone.")
    torch.save({"state_dict": state}, tmp_path / "swin.pth")
    merge = imported("swin3d_tiny", tmp_path / "swin.pth", tmp_path).net.features[1]
    x = torch.randn(1, 2, height, breadth, width)
    y = merge(x)
    gain, shift = (state[f"backbone.layers.0.downsample.norm.{key}"] for key in ("weight", "bias"))
    matrix = state["backbone.layers.0.downsample.reduction.weight"]
    assert y.shape[2:4] == (-(-height // 2), -(-breadth // 2))
    for t, i, j in itertools.product(range(2), range(y.shape[2]), range(y.shape[3])):
        row = torch.zeros(4 * width)
        for at, (di, dj) in enumerate(((0, 0), (1, 0), (0, 1), (1, 1))):
            if 2 * i + di < height and 2 * j + dj < breadth:
                row[at * width : (at + 1) * width] = x[0, t, 2 * i + di, 2 * j + dj]
        row = (row - row.mean()) / (row.var(unbiased=False) + 1e-5).sqrt() * gain + shift
        torch.testing.assert_close(y[0, t, i, j], matrix @ row, rtol=1e-4, atol=1e-5)


def test_bias_table_takes_the_originals_order(tmp_path: Path) -> None:
    """Row ((dt + T-1)(2H-1) + dh + H-1)(2W-1) + dw + W-1 of the table is the bias of offset (dt, dh, dw)."""
    window = (2, 3, 3)
    state = swin_release(fresh("swin3d_tiny").library_state(), 2, "norm", "backbone.")
    state = {key: value for key, value in state.items() if "index" not in key}
    torch.save({"state_dict": state}, tmp_path / "swin.pth")
    attention = imported("swin3d_tiny", tmp_path / "swin.pth", tmp_path).net.features[0][1].attn
    bias = attention.get_relative_position_bias(list(window))[0]
    table = state["backbone.layers.0.blocks.1.attn.relative_position_bias_table"]
    places = list(itertools.product(*map(range, window)))
    for (n, a), (m, b) in itertools.product(enumerate(places), enumerate(places)):
        dt, dh, dw = (p - q for p, q in zip(a, b, strict=True))
        row = ((dt + window[0] - 1) * (2 * window[1] - 1) + dh + window[1] - 1) * (2 * window[2] - 1) + dw + 2
        assert torch.equal(bias[:, n, m], table[row])


def test_options_reach_the_network(tmp_path: Path) -> None:
    """Something-Something's Video Swin has another window."""
    theirs = fresh("swin3d_tiny", window=(4, 3, 3))
    torch.save({"state_dict": swin_release(theirs.library_state(), 2, "norm", "backbone.")}, tmp_path / "swin.pth")
    with pytest.raises(MdlError, match="do not fit"):
        import_weights("swin3d_tiny", tmp_path / "swin.pth", tmp_path / "wrong", tag="test")
    ours = imported("swin3d_tiny", tmp_path / "swin.pth", tmp_path, options={"window": [4, 3, 3]})
    x = clip_of(ours)
    assert torch.equal(ours(x), theirs(x))
    with pytest.raises(MdlError, match="window"):
        import_weights("swin3d_tiny", tmp_path / "swin.pth", tmp_path / "other", tag="t", options={"window": 7})


def test_a_longer_window_adds_rows_to_the_tables_of_relative_positions() -> None:
    """(16, 7, 7) of Something-Something's Video Swin-B: 2 * 16 - 1 distances in time where (8, 7, 7) has 15."""
    with torch.device("meta"):
        usual, longer = fresh("swin3d_b"), fresh("swin3d_b", window=(16, 7, 7))
    count, more = (sum(p.numel() for p in net.net.parameters()) for net in (usual, longer))
    heads = sum(depth * width for depth, width in zip((2, 2, 18, 2), (4, 8, 16, 32), strict=True))
    assert more - count == (31 - 15) * 13 * 13 * heads


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x3d_tiny", ("no layout", "looks like OpenAI's CLIP")),
        ("vit_tiny", ("ViT or ViViT",)),
        ("swin3d_tiny", ("of its authors or of mmaction2",)),
    ],
)
def test_what_a_backbone_accepts(name: str, words: tuple[str, ...], tmp_path: Path) -> None:
    torch.save(OpenAiVision(64, 1, 4, 8, 32).state_dict(), tmp_path / "ViT.pt")
    with pytest.raises(MdlError) as caught:
        import_weights(name, tmp_path / "ViT.pt", tmp_path / "made", tag="test")
    assert all(word in str(caught.value) for word in (*words, "accepts", "library's own keys")), str(caught.value)


def test_another_size_is_named(tmp_path: Path) -> None:
    torch.save(OpenAiVision(32, 3, 4, 8, 32).state_dict(), tmp_path / "ViT.pt")
    with pytest.raises(MdlError, match=r"shape \[32\], \[64\] expected"):
        import_weights("clip_vit_tiny", tmp_path / "ViT.pt", tmp_path / "made", tag="test")
