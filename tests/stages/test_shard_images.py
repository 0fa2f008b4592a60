"""The shard stage on images: stored bytes, small JPEGs, arrays, and what cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from mdltool.artifact import Artifact, open_artifact
from mdltool.data.encode import Encoding
from mdltool.data.image import read_image
from mdltool.data.index import ShardIndex
from mdltool.errors import MdlError
from mdltool.stages.shard import Dataset, Effort, Writing, merge, run
from tests.conftest import Ran
from tests.data.tiny_shards import make_video
from tests.images import encoded, pixels, write_images
from tests.stages.class_folders import contents

JPEG_72 = Encoding("jpeg", 24)


def samples(artifact: Artifact) -> dict[str, dict[str, bytes]]:
    urls = [str(path) for path in sorted(artifact.path.glob("*.tar"))]
    return {s["__key__"]: s for s in webdataset.WebDataset(urls, shardshuffle=False)}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of images and one video."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, *(f"{c}/{i}.{s}" for i, (c, s) in enumerate([("a", "png"), ("b", "jpg")] * 4)))
    (folder / "a" / "clip.mp4").write_bytes(make_video(8))
    return folder


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arrays") / "digits.npz"
    x = np.stack([pixels(seed, 20, 30) for seed in range(6)])
    np.savez_compressed(path, x_train=x, y_train=[1, 0] * 3, x_test=x[..., 0], y_test=[0] * 6)
    return path


class TestStored:
    def test_copies_keep_bytes_and_extension(self, images: Path, tmp_path: Path) -> None:
        artifact = run(Dataset(images, "folder", "d", "train"), tmp_path / "out")
        found = samples(artifact)
        assert len(found) == 9
        assert found["a/0"]["png"] == (images / "a" / "0.png").read_bytes()
        assert found["b/1"]["jpg"] == (images / "b" / "1.jpg").read_bytes()
        about = json.loads(found["b/1"]["json"])
        assert {"image": True, "width": 56, "height": 40, "frames": 1, "class": "b"}.items() <= about.items()
        assert "image" not in json.loads(found["a/clip"]["json"])

    def test_small_jpegs_are_scaled_upright_and_marked(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        source = write_images(tmp_path / "in", "a/turned.png", exif=exif)
        small = encoded(pixels(1, 20, 22), "JPEG")
        (source / "a" / "small.jpg").write_bytes(small)
        found = samples(run(Dataset(source, "folder", "d", "train"), tmp_path / "out", Writing(JPEG_72)))
        assert found["a/small"]["jpg"] == small
        scaled = read_image(found["a/turned"]["jpg"])
        assert scaled.shape == (34, 24, 3)
        wanted = Image.fromarray(np.rot90(pixels(0), -1)).resize((24, 34), Image.Resampling.BICUBIC)
        assert np.abs(scaled.astype(int) - np.asarray(wanted)).mean() < 4
        assert json.loads(found["a/turned"]["json"])["height"] == 34

    @pytest.mark.parametrize("encoding", [Encoding(), JPEG_72], ids=["copy", "jpeg"])
    def test_equal_bytes_whatever_workers_and_parts(
        self, encoding: Encoding, images: Path, arrays: Path, tmp_path: Path
    ) -> None:
        for i, dataset in enumerate(
            (Dataset(images, "folder", "d", "train"), Dataset(arrays, "arrays", "d", "train"))
        ):
            writing = Writing(encoding, shard_bytes=3000 if i == 0 else 1500)
            whole = run(dataset, tmp_path / f"whole{i}", writing)
            parts = [
                run(
                    dataset,
                    tmp_path / f"part{i}{k}",
                    Writing(encoding, writing.shard_bytes, part=(k, 2)),
                    Effort(workers=2),
                )
                for k in range(2)
            ]
            merged = merge(parts, tmp_path / f"merged{i}", tmp_path, 0.01)
            assert contents(merged) == contents(whole)
            assert merged.digest == whole.digest
            assert len(ShardIndex.open(whole).files) > 1

    def test_arrays_become_pngs_without_loss(self, arrays: Path, tmp_path: Path) -> None:
        found = samples(run(Dataset(arrays, "arrays", "d", "train"), tmp_path / "train"))
        assert np.array_equal(read_image(found["digits_npz/x_train/000004"]["png"]), pixels(4, 20, 30))
        assert json.loads(found["digits_npz/x_train/000004"]["json"])["source"] == "digits.npz/x_train/000004"
        grey = samples(run(Dataset(arrays, "arrays", "d", "test"), tmp_path / "test"))
        assert np.array_equal(
            read_image(grey["digits_npz/x_test/000002"]["png"])[..., 2], pixels(2, 20, 30)[..., 0]
        )


class TestUnusable:
    def test_each_with_its_reason_and_the_rest_is_used(self, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
        source = write_images(tmp_path / "in", "a/good.png", "a/cmyk.jpg")
        (source / "a" / "cmyk.jpg").write_bytes(encoded(Image.new("CMYK", (9, 9)), "JPEG"))
        noise = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8), "JPEG")
        (source / "a" / "cut.jpg").write_bytes(noise[:-500])
        (source / "a" / "page.png").write_bytes(b"<html>404</html>")
        (source / "a" / "empty.bmp").touch()
        out = tmp_path / "out"
        words = ("shard", source, "--format", "folder", "--domain", "d", "--split", "train", "--out", out)
        assert mdltool(*words).code == 1
        ran = mdltool(*words, "--max-bad", "60%")
        assert "images: 5 of them" in ran.err
        reasons = {row["video"]: row["reason"] for row in map(json.loads, (out / "quarantine.jsonl").open())}
        assert reasons.pop("a/cut.jpg").startswith("the image does not decode (image file is truncated")
        assert reasons == {"a/page.png": "an HTML page, not an image", "a/empty.bmp": "the file is empty"}
        assert set(samples(open_artifact(ran.path))) == {"a/good", "a/cmyk"}

    def test_images_have_no_segments_and_are_not_h264(self, images: Path, tmp_path: Path) -> None:
        (tmp_path / "list.csv").write_text("path,label,start,end\na/0.png,x,0,1\na/clip.mp4,x,,\n")
        dataset = Dataset(images, "csv", "d", "train", tmp_path / "list.csv")
        artifact = run(dataset, tmp_path / "out", effort=Effort(max_bad=0.5))
        assert "an image has no times" in (artifact.path / "quarantine.jsonl").read_text()
        with pytest.raises(MdlError, match="8 of the clips are images, which are not stored as h264"):
            run(Dataset(images, "folder", "d", "train"), tmp_path / "h264", Writing(Encoding("h264")))
        assert not list(tmp_path.glob("h264*"))
