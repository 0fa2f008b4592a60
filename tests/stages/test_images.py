"""Image domains end to end: generated, sharded from three formats, trained with crops of their own, used."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mdltool.artifact import open_artifact
from mdltool.data.image import read_image
from mdltool.data.index import ShardIndex
from mdltool.data.loader import Stream, TrainLoader
from mdltool.domain_pack import read_pack
from mdltool.evaluate.views import load_views
from mdltool.model_store import extended, load_model, reduced
from mdltool.recipe import load
from mdltool.stages import split_domain
from mdltool.stages.fitting import gather_data
from mdltool.stages.plan import eval_views, order_of, sampling, train_transform, val_views
from tests.conftest import Ran, run_mdltool

NORMALIZE = {"mean": [0.1, 0.2, 0.3], "std": [0.2, 0.25, 0.5]}
SETS = (
    "train.steps.0.updates=3",
    "train.checkpoint_every=1",
    "data.crop=32",
    "data.augment.short_side=[36, 36]",
    "data.batch=6",
    "views.short_side=36",
    "domains.neon.crop=40",
    "domains.neon.short_side=40",
    "domains.neon.augment=none",
    "domains.neon.normalize={mean: [0.1, 0.2, 0.3], std: [0.2, 0.25, 0.5]}",
)


@dataclass(frozen=True)
class Made:
    work: Path
    images: Path

    def words(self, command: str, *words: object, splits: Sequence[str] = ("train", "val")) -> list[object]:
        data = [f"{d}={self.work}/shards/{d}-{s}" for d in ("chalk", "neon") for s in splits]
        return [command, *words, *(w for entry in data for w in ("--data", entry)), "--work", self.work]


def as_coco(folder: Path) -> Path:
    """A COCO-style file of class folders."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    classes = sorted({name.split("/")[0] for name in names})
    content = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [
            {"image_id": i, "category_id": classes.index(n.split("/")[0])} for i, n in enumerate(names)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes)],
    }
    path = folder.with_suffix(".json")
    path.write_text(json.dumps(content))
    return path


def as_arrays(folder: Path) -> Path:
    """The same as .npz."""
    files = sorted(folder.rglob("*.png"))
    path = folder.with_suffix(".npz")
    images, labels = np.stack([read_image(file) for file in files]), np.array([file.parent.name for file in files])
    np.savez(path, **{f"x_{folder.name}": images, f"y_{folder.name}": labels})
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("images")
    made = Made(root / "work", root / "images")
    words = ("--images", "--domains", "chalk,neon", "--clips-per-class", 5)
    assert run_mdltool("synth", "--out", made.images, *words).code == 0
    neon = made.images / "neon"
    sources = {
        ("chalk", "train"): (made.images / "chalk" / "train", "folder"),
        ("chalk", "val"): (made.images / "chalk" / "val", "folder"),
        ("neon", "train"): (neon / "train", "coco", "--annotations", as_coco(neon / "train")),
        ("neon", "val"): (as_arrays(neon / "val"), "arrays"),
    }
    for (domain, split), (source, form, *words) in sources.items():
        words += ["--domain", domain, "--split", split, "--work", made.work]
        ran = run_mdltool("shard", source, "--format", form, *words)
        assert ran.code == 0, ran.err
    return made


def recipe_words(*sets: str) -> list[str]:
    return [word for entry in (*SETS, *sets) for word in ("--set", entry)]


def two_domains(path: Path) -> Path:
    import yaml

    from mdltool.recipe import find

    content = yaml.safe_load(find("tiny_decathlon").read_text())
    del content["domains"]["field"]
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def model(made: Made) -> Path:
    recipe = two_domains(made.work / "two.yaml")
    return run_mdltool(*made.words("train", "--recipe", recipe, *recipe_words())).path


def test_every_format_gives_the_same_clips(made: Made) -> None:
    train, val = (ShardIndex.open(open_artifact(made.work / "shards" / f"neon-{s}")) for s in ("train", "val"))
    assert train.classes == val.classes
    assert (len(train), len(val)) == (20, 8)
    for i in range(len(val)):
        about, content = val.clip(i)
        files = sorted((made.images / "neon" / "val").rglob("*.png"))
        source = files[int(about["source"].rsplit("/", 1)[1])]
        assert np.array_equal(read_image(content), read_image(source))
        assert source.parent.name == about["class"]


def test_a_batch_has_its_domains_crop_and_no_augmentation(made: Made) -> None:
    recipe = load(str(two_domains(made.work / "three.yaml")), SETS)
    shards = [open_artifact(made.work / "shards" / f"{d}-train") for d in ("chalk", "neon")]
    data = gather_data(recipe, shards)
    order = order_of(recipe, {name: len(part.train_index) for name, part in data.items()})
    streams = [Stream(data[d].train_index, sampling(recipe, d), train_transform(recipe, d)) for d in data]
    batches = list(TrainLoader(streams, order, seed=0, workers=0, updates=range(2)))
    assert [(b.domain, b.frames.shape[1:]) for b in batches] == 2 * [
        ("chalk", (3, 1, 32, 32)),
        ("neon", (3, 1, 40, 40)),
    ]
    whole = data["neon"].train_index
    for key, frames in zip(batches[1].keys, batches[1].frames, strict=True):
        _, content = whole.clip(whole.keys.index(key))
        for spec in (eval_views(recipe, "neon"), val_views(recipe, "neon")):
            (view,) = load_views(content, spec, image=True).frames
            assert torch.equal(frames, view)
    assert (eval_views(recipe, "chalk").crop, eval_views(recipe, "chalk").short_side) == (32, 36)


def test_trained_evaluated_and_asked(made: Made, model: Path, mdltool: Callable[..., Ran]) -> None:
    ran = mdltool(*made.words("eval", model, splits=("val",)))
    metrics = open_artifact(ran.path).load_json("metrics.json")["domains"]
    assert {d: entry["clips"]["evaluated"] for d, entry in metrics.items()} == {"chalk": 8, "neon": 8}
    assert {entry["decoder"] for entry in metrics.values()} == {"pillow"}
    # crops of two sizes in one call
    stars, discs = (
        [made.images / d / "val" / c / f"{c}_0000.png"] for d, c in (("neon", "star"), ("chalk", "disc"))
    )
    words = ("--json", "--work", made.work)
    ran = mdltool("predict", model, *stars, *discs, "--domain", "neon", "--domain", "chalk", *words)
    assert ran.code == 0, ran.err
    star, disc = map(json.loads, ran.out.splitlines())
    assert sorted(entry["label"] for entry in star["top"]) == ["ring", "square", "star", "triangle"]
    assert sorted(entry["label"] for entry in disc["top"]) == ["bars", "cross", "disc", "triangle"]
    alone = mdltool("predict", model, *stars, "--domain", "neon", *words).json
    assert [entry["label"] for entry in alone["top"]] == [entry["label"] for entry in star["top"]]
    scores = [[entry["score"] for entry in found["top"]] for found in (alone, star)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


class TestNormalisation:
    def frames(self) -> torch.Tensor:
        return torch.randint(
            0, 256, (3, 3, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )

    def by_hand(self, frames: torch.Tensor, mean: Any, std: Any) -> torch.Tensor:
        mean, std = (torch.tensor(values).view(1, 3, 1, 1, 1) for values in (mean, std))
        return (frames.float() / 255 - mean) / std

    def test_each_domain_has_its_own_wherever_it_runs(self, model: Path) -> None:
        loaded = load_model(open_artifact(model))
        assert loaded.spec.normalize == {"neon": NORMALIZE}
        frames = self.frames()
        usual = (loaded.backbone.mean, loaded.backbone.std)
        with torch.no_grad():
            for domain, values in (("neon", NORMALIZE.values()), ("chalk", usual)):
                expected = loaded(self.by_hand(frames, *values), domain)
                assert torch.equal(loaded(frames, domain), expected)
            mixed = loaded(frames, ["neon", "chalk", "neon"])
            for row, domain in enumerate(("neon", "chalk", "neon")):
                torch.testing.assert_close(mixed[row], loaded(frames[row : row + 1], domain)[0])

    def test_it_comes_and_goes_with_its_domain(self, made: Made, model: Path, tmp_path: Path) -> None:
        loaded = load_model(open_artifact(model))
        assert reduced(loaded, "neon").spec.normalize == {}
        assert reduced(loaded, "chalk").spec.normalize == {"neon": NORMALIZE}
        path = tmp_path / "neon.safetensors"
        split_domain.run(open_artifact(model), "neon", path, work=made.work)
        loaded.unmount("neon")
        assert loaded.spec.normalize == {}
        loaded.mount("neon", read_pack(path))
        assert loaded.spec == load_model(open_artifact(model)).spec
        more = extended(loaded, "dusk", 2, normalize={"dusk": {"mean": [0.0] * 3, "std": [1.0] * 3}})
        frames = self.frames()
        with torch.no_grad():
            assert torch.equal(more(frames, "dusk"), more(frames.float() / 255, "dusk"))
            assert torch.equal(more(frames, "neon"), loaded(frames, "neon"))


class TestSubset:
    def loader(self, made: Made, start: int, *sets: str) -> TrainLoader:
        recipe = load(str(two_domains(made.work / "subset.yaml")), [*SETS, *sets])
        shards = [
            open_artifact(made.work / "shards" / f"{d}-{s}") for d in ("chalk", "neon") for s in ("train", "val")
        ]
        data = gather_data(recipe, shards)
        assert [len(part.val_index or ()) for part in data.values()] == [8, 8]
        order = order_of(recipe, {name: len(part.train_index) for name, part in data.items()})
        streams = [Stream(data[d].train_index, sampling(recipe, d), train_transform(recipe, d)) for d in data]
        return TrainLoader(streams, order, seed=0, workers=0, updates=range(start, 4))

    def test_training_reads_the_subset_alone_and_resumes_in_it(
        self, made: Made, capsys: pytest.CaptureFixture[str]
    ) -> None:
        whole = list(self.loader(made, 0, "data.per_class=2"))
        said = capsys.readouterr().err
        assert "neon: 8 of 20 training clips (2 of a class, seed 0)" in said
        assert "have fewer" not in said
        self.loader(made, 0, "data.per_class=9")
        assert "neon: 4 classes have fewer than 9 clips: " in capsys.readouterr().err
        for domain in ("chalk", "neon"):
            keys = {key for batch in whole if batch.domain == domain for key in batch.keys}
            assert len(keys) == 8
        resumed = list(self.loader(made, 2, "data.per_class=2"))
        for ours, theirs in zip(whole[4:], resumed, strict=True):
            assert ours.keys == theirs.keys
            assert torch.equal(ours.frames, theirs.frames)

    def test_it_is_announced_counted_and_part_of_the_request(self, made: Made, tmp_path: Path) -> None:
        recipe = two_domains(made.work / "subset.yaml")
        sets = recipe_words("train.steps.0.updates=1", "data.fraction=0.2", "data.subset_seed=3")
        words = made.words("train", "--recipe", recipe, *sets, splits=("train",))
        ran = run_mdltool(*words, "--out", tmp_path / "fifth")
        assert "chalk: 4 of 20 training clips (20%, seed 3)" in ran.err
        artifact = open_artifact(ran.path)
        assert artifact.summary["domains"]["neon"]["clips"] == 4
        assert (artifact.request["data"]["fraction"], artifact.request["data"]["subset_seed"]) == (0.2, 3)
