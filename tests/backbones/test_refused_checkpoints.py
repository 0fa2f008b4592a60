"""Checkpoints that are code: refused, never run, and the lines of the message export them."""

from __future__ import annotations

import json
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdltool.errors import MdlError
from mdltool.stages.weights import import_weights, read_checkpoint
from tests.backbones.published import OpenAiVision, clip_of, imported, randomize

# The residual adapters' release: a restatement of its network, which is pickled whole


class ConvTask(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bns = nn.ModuleList([nn.BatchNorm2d(outputs)])

    def forward(self, x: Tensor) -> Tensor:
        return self.bns[0](self.conv(x))


class ReleaseBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.grows = inputs != outputs
        self.conv1 = ConvTask(inputs, outputs, 2 if self.grows else 1)
        self.conv2 = nn.Sequential(nn.ReLU(), ConvTask(outputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))
        if self.grows:
            x = nn.functional.avg_pool2d(x, 2)
            x = torch.cat([x, x * 0], 1)
        return (x + y).relu()


class Release(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.pre_layers_conv = ConvTask(3, width)
        for n in range(3):
            blocks = [ReleaseBlock((width << n) * (1 if i == 0 else 2), width << n + 1) for i in range(4)]
            self.add_module(f"layer{n + 1}", nn.Sequential(*blocks))
        self.end_bns = nn.ModuleList([nn.Sequential(nn.BatchNorm2d(8 * width), nn.ReLU())])
        self.linears = nn.ModuleList([nn.Linear(8 * width, 1000)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.pre_layers_conv(x))))
        return self.end_bns[0](x).mean((2, 3))


@pytest.mark.parametrize("zipped", [True, False])
def test_residual_adapters_release(zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = randomize(Release(8))
    whole = {"net": nn.DataParallel(theirs), "acc": 0.5, "epoch": 3}
    monkeypatch.chdir(tmp_path)
    torch.save(whole, "ckpt.t7", _use_new_zipfile_serialization=zipped)
    with pytest.raises(MdlError, match="whole module") as caught:
        import_weights("resnet26_tiny", Path("ckpt.t7"), tmp_path / "made", tag="imagenet")
    _follow(caught.value)
    ours = imported("resnet26_tiny", tmp_path / "export.pth", tmp_path)
    x = clip_of(ours)
    torch.testing.assert_close(ours(x)[:, 0], theirs(x[:, :, 0]), rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.classifier["fc.weight"], theirs.linears[0].weight)


def _follow(error: MdlError) -> None:
    """Run the lines that a message gives, as the user would."""
    lines = (error.fix or "").splitlines()
    exec("\n".join(line.strip() for line in lines if line.startswith("    ")), {})


class Bomb:
    """A pickle that runs a command when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        import os

        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("form", ["file", "legacy", "raw", "directory", "shard"])
def test_code_is_refused_and_not_run(form: str, tmp_path: Path) -> None:
    content = {"weights": torch.zeros(2), "extra": Bomb(tmp_path / "ran")}
    path = tmp_path / "evil.pth"
    if form == "raw":
        path.write_bytes(pickle.dumps(content))
    elif form in ("file", "legacy"):
        torch.save(content, path, _use_new_zipfile_serialization=form == "file")
    else:
        path = tmp_path / "evil"
        path.mkdir()
        name = "pytorch_model.bin" if form == "directory" else "pytorch_model-1.bin"
        torch.save(content, path / name)
        if form == "shard":
            index = json.dumps({"weight_map": {"weights": name}})
            (path / "pytorch_model.bin.index.json").write_text(index)
    with pytest.raises(MdlError, match="run"):
        import_weights("vit_tiny", path, tmp_path / "made", tag="test")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "made.partial").exists()


@pytest.mark.filterwarnings("ignore")  # tracing warns of what does not matter here
def test_torchscript_is_refused_with_the_lines_that_export_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = randomize(OpenAiVision(64, 3, 4, 8, 32))
    monkeypatch.chdir(tmp_path)
    torch.jit.trace(theirs, torch.zeros(1, 3, 32, 32)).save("ViT.pt")
    with pytest.raises(MdlError, match="TorchScript") as caught:
        read_checkpoint(Path("ViT.pt"))
    _follow(caught.value)
    state = read_checkpoint(Path("export.pth"))
    assert torch.equal(state["conv1.weight"], theirs.conv1.weight)


def test_records_beside_the_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mmengine leaves its logs' objects in checkpoints that are not published."""
    module = types.ModuleType("mmengine.logging")
    exec("class HistoryBuffer: pass", module.__dict__)
    monkeypatch.setitem(sys.modules, "mmengine", types.ModuleType("mmengine"))
    monkeypatch.setitem(sys.modules, "mmengine.logging", module)
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": {"a": torch.ones(2)}, "message_hub": module.__dict__["HistoryBuffer"]()}
    torch.save(content, "epoch_30.pth")
    with pytest.raises(MdlError, match="beside its tensors") as caught:
        read_checkpoint(Path("epoch_30.pth"))
    _follow(caught.value)
    assert torch.equal(read_checkpoint(Path("export.pth"))["a"], torch.ones(2))


def test_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    with pytest.raises(MdlError, match="web page, no checkpoint"):
        read_checkpoint(tmp_path / "page.pth")
    (tmp_path / "empty.pth").touch()
    with pytest.raises(MdlError, match="empty, no checkpoint"):
        read_checkpoint(tmp_path / "empty.pth")
    (tmp_path / "text.pth").write_text("not found")
    with pytest.raises(MdlError, match="no checkpoint") as caught:
        read_checkpoint(tmp_path / "text.pth")
    assert "arbitrary code" not in str(caught.value), "torch's own advice is to run the file"
    (tmp_path / "cut.safetensors").write_bytes(b"\xff\0\0\0\0\0\0\0{")
    with pytest.raises(MdlError, match="safetensors"):
        read_checkpoint(tmp_path / "cut.safetensors")
