"""`backbone fetch` from a loopback server, a mirror, the hub and a file, and what import makes of it."""

from __future__ import annotations

import errno
import http.server
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

from mdltool.backbones import BACKBONES, sources
from mdltool.backbones.image_transformer import VitTiny
from mdltool.errors import MdlError
from mdltool.stages.fetch import fetch
from mdltool.stages.weights import import_weights
from mdltool.train import checkpoint
from tests.conftest import Ran
from tests.file_server import Server, own_world, server, sha

__all__ = ["own_world", "server"]  # fixtures
pytestmark = pytest.mark.usefixtures("own_world")


@pytest.fixture(scope="module")
def weights() -> bytes:
    """A PyTorchVideo checkpoint of x3d_tiny."""
    import io

    factory = BACKBONES.load("x3d_tiny")
    buffer = io.BytesIO()
    backbone = factory(factory.Options(), factory.default_frames, factory.default_crop)
    torch.save({"model_state": backbone.library_state()}, buffer)
    return buffer.getvalue()


def test_fetch_makes_what_import_makes(server: Server, weights: bytes, tmp_path: Path, mdltool: Any) -> None:
    server.files["/X3D.pyth"] = weights
    server.cuts = [10_000]
    ran = mdltool("backbone", "fetch", "x3d_tiny", "--url", f"{server.url}/X3D.pyth", "--sha256", sha(weights))
    assert ran.path.name == "x3d_tiny-imported"
    assert "the connection was cut" in ran.err
    (tmp_path / "X3D.pyth").write_bytes(weights)
    words = ("backbone", "import", "x3d_tiny", "--file", tmp_path / "X3D.pyth")
    again = mdltool(*words, "--out", tmp_path / "other", "--json").json
    fetched = mdltool("inspect", ran.path, "--json").json
    assert again["digest"] == fetched["digest"]
    assert again["kind"] == "backbone"
    assert mdltool(*words).path == ran.path, "the same content is reused"


def test_fetch_official(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: bytes) -> None:
    """The address is the zoo's, the mirror is the loopback server."""
    official = sources.source_of("x3d_m", "kinetics400", BACKBONES.load("x3d_m").weight_sources)
    host_and_path = official.urls[0].removeprefix("https:/")
    server.files[host_and_path] = weights
    monkeypatch.setattr(
        BACKBONES.load("x3d_tiny"), "weight_sources", BACKBONES.load("x3d_m").weight_sources, raising=False
    )
    monkeypatch.setenv("MDLTOOL_MIRROR", server.url)
    made = fetch("x3d_tiny", tmp_path / "made", tag="kinetics400")
    assert made.load_json("backbone.json")["source"] == "X3D_M.pyth"
    assert server.asked == [(host_and_path, None)]
    folder = tmp_path / "mirror" / host_and_path.lstrip("/")
    folder.parent.mkdir(parents=True)
    folder.write_bytes(weights)
    for mirror in ((tmp_path / "mirror").as_uri(), str(tmp_path / "mirror")):
        monkeypatch.setenv("MDLTOOL_MIRROR", mirror)
        monkeypatch.setenv("MDLTOOL_CACHE", str(tmp_path / f"cache{len(mirror)}"))
        assert fetch("x3d_tiny", tmp_path / f"made{len(mirror)}", tag="kinetics400").digest == made.digest
    assert len(server.asked) == 1


def test_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mdltool: Callable[..., Ran]) -> None:
    """A port where nobody listens stands for it."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        port = server.server_address[1]
    monkeypatch.setenv("MDLTOOL_MIRROR", f"http://127.0.0.1:{port}")
    ran = mdltool("backbone", "fetch", "x3d_m")
    assert ran.code == 1
    assert "https://dl.fbaipublicfiles.com/pytorchvideo/model_zoo/kinetics/X3D_M.pyth" in ran.err
    assert "mdltool backbone import x3d_m --file X3D_M.pyth --tag kinetics400" in ran.err
    assert "Traceback" not in ran.err
    ran = mdltool("backbone", "fetch", "clip_vit_b16")
    assert "openai/clip-vit-base-patch16/resolve/main/model.safetensors" in ran.err
    assert "mdltool backbone import clip_vit_b16 --file" in ran.err
    monkeypatch.delenv("MDLTOOL_MIRROR")
    # The hub's library tries for 20 seconds where nobody answers; switched off, it ends the same way.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ran = mdltool("backbone", "fetch", "vit_b16")
    assert ran.code == 1
    assert "google/vit-base-patch16-224-in21k/resolve/main/model.safetensors" in ran.err
    assert "mdltool backbone import vit_b16 --file model.safetensors --tag imagenet21k" in ran.err


def test_fetch_file_checks_the_official_hash(
    server: Server, tmp_path: Path, weights: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "X3D.pyth"
    file.write_bytes(weights)
    monkeypatch.setattr(
        BACKBONES.load("x3d_tiny"), "weight_sources", {"a": f"https://nowhere.test/x3d-{sha(weights)[:8]}.pth"}
    )
    made = fetch("x3d_tiny", tmp_path / "made", tag="a", file=file)
    assert made.digest == import_weights("x3d_tiny", file, tmp_path / "other", tag="a").digest
    file.write_bytes(weights + b"\0")
    with pytest.raises(MdlError, match="is expected"):
        fetch("x3d_tiny", tmp_path / "wrong", tag="a", file=file)
    with pytest.raises(MdlError, match="no sha256"):
        fetch("x3d_tiny", tmp_path / "wrong", tag="a", file=file, sha256="12")
    with pytest.raises(MdlError, match="exclude"):
        fetch("x3d_tiny", tmp_path / "wrong", tag="a", file=file, url="http://127.0.0.1/x")
    with pytest.raises(MdlError, match="directory"):
        fetch("x3d_tiny", tmp_path / "wrong", tag="a", file=tmp_path, sha256="0" * 64)


def test_nothing_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(MdlError, match="no official weights") as caught:
        fetch("x3d_tiny", tmp_path / "made", tag="imported")
    assert "--url" in str(caught.value)
    with pytest.raises(MdlError, match="kinetics400"):
        fetch("x3d_m", tmp_path / "made", tag="kinetics40")
    with pytest.raises(MdlError, match="import resnet26 --file"):
        fetch("resnet26", tmp_path / "made", tag="imagenet")


def test_a_page_instead_of_weights(server: Server, tmp_path: Path) -> None:
    server.files["/login.pth"] = b"<html>please log in</html>"
    with pytest.raises(MdlError, match="no checkpoint"):
        fetch("x3d_tiny", tmp_path / "made", tag="a", url=f"{server.url}/login.pth")
    assert not (tmp_path / "made.partial").exists()


# Sources


@pytest.mark.parametrize("name", list(BACKBONES))
def test_every_source(name: str) -> None:
    for tag, text in BACKBONES.load(name).weight_sources.items():
        found = sources.parse(text)
        if found is None:
            assert "state dict" in text or "import" in text, f"{name} {tag}: {text}"
            continue
        assert all(re.match(r"https://\S+/\S+\.(pyth|pth|safetensors|bin)$", url) for url in found.urls)
        if text.startswith("torchvision"):
            assert found.sha256 is not None
            assert len(found.sha256) == 8


# The model hub: its library where it is installed, plain addresses where it is not

REPOSITORY = "google/vit-base-patch16-224-in21k"


@pytest.fixture
def hub(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The loopback server as the hub, with a small ViT in place of the official one."""
    monkeypatch.setattr(BACKBONES.load("vit_tiny"), "weight_sources", {"in21k": REPOSITORY}, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    model = ViTForImageClassification(ViTConfig(**VitTiny.config))
    model.save_pretrained(tmp_path / "vit")
    content = (tmp_path / "vit" / "model.safetensors").read_bytes()
    server.files[f"/{REPOSITORY}/resolve/main/model.safetensors"] = content
    server.etag = f'"{sha(content)}"'
    return server


def without_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("pickled", [True, False])
def test_hub(hub: Server, library: bool, pickled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = import_weights("vit_tiny", tmp_path / "vit", tmp_path / "imported", tag="in21k")
    if not library:
        without_hub(monkeypatch)
    if pickled:
        torch.save(load_file(tmp_path / "vit" / "model.safetensors"), tmp_path / "pytorch_model.bin")
        hub.files = {f"/{REPOSITORY}/resolve/main/pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()}
        hub.etag = f'"{sha(next(iter(hub.files.values())))}"'
    hub.cuts = [20_000]
    made = fetch("vit_tiny", tmp_path / "made", tag="in21k")
    assert made.files["backbone.safetensors"] == expected.files["backbone.safetensors"]
    file = "pytorch_model.bin" if pickled else "model.safetensors"
    assert made.load_json("backbone.json")["source"] == f"{REPOSITORY}/{file}"
    hub.files.clear()
    assert fetch("vit_tiny", tmp_path / "again", tag="in21k").digest == made.digest, "from the cache"


@pytest.mark.parametrize("library", [True, False])
def test_hub_without_the_repository(
    hub: Server, library: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not library:
        without_hub(monkeypatch)
    hub.files.clear()
    with pytest.raises(MdlError):
        fetch("vit_tiny", tmp_path / "made", tag="in21k")


def test_hub_cache_of_another_content(hub: Server, tmp_path: Path) -> None:
    """The library trusts the server's length; its name for the file is the sha256 that the hub states."""
    key = f"/{REPOSITORY}/resolve/main/model.safetensors"
    hub.files[key] = hub.files[key][:-1] + b"\x7f"
    with pytest.raises(MdlError, match="is expected"):
        fetch("vit_tiny", tmp_path / "made", tag="in21k")


def test_a_full_cache_of_the_hub_is_named(hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(MdlError, match="cannot be written") as caught:
        fetch("vit_tiny", tmp_path / "made", tag="in21k")
    assert "hub" in str(caught.value.where)


def test_what_an_import_cannot_write_is_not_left(
    weights: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "X3D.pyth").write_bytes(weights)

    def full(_: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"some")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        import_weights("x3d_tiny", tmp_path / "X3D.pyth", tmp_path / "made", tag="k400")
    assert str(caught.value.filename).startswith(str(tmp_path / "made"))
    assert [path.name for path in tmp_path.iterdir()] == ["X3D.pyth"]


def test_hf_home(hub: Server, tmp_path: Path) -> None:
    """HF_HOME is read when a process starts: what one has downloaded there, another imports without the server."""
    code = (
        "from mdltool.backbones import BACKBONES\n"
        f"BACKBONES.load('vit_tiny').weight_sources = {{'in21k': {REPOSITORY!r}}}\n"
        "from pathlib import Path\nfrom mdltool.stages.fetch import fetch\nimport sys\n"
        "print(fetch('vit_tiny', Path(sys.argv[1]), tag='in21k').digest)"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_CACHE", None)
    digests = []
    for n in range(2):
        environment["HF_ENDPOINT"] = "http://127.0.0.1:9" if n else hub.url  # where nobody listens
        ran = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / f"made{n}")],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
        digests.append(ran.stdout)
    assert digests[0] == digests[1]
    assert list((tmp_path / "home" / "hub").rglob("model.safetensors"))


def test_safetensors_by_url(server: Server, tmp_path: Path) -> None:
    factory = BACKBONES.load("x3d_tiny")
    state = factory(factory.Options(), factory.default_frames, factory.default_crop).library_state()
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "x.safetensors")
    made = fetch("x3d_tiny", tmp_path / "made", tag="a", url=(tmp_path / "x.safetensors").as_uri())
    assert set(load_file(made.file("backbone.safetensors"))) == set(state)
