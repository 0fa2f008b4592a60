"""Reading clips out of shards, and refusing indices that do not describe them."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdltool.artifact import Artifact, begin, open_artifact
from mdltool.data.index import ShardIndex
from mdltool.errors import MdlError
from mdltool.files import sha256_file
from tests.data.tiny_shards import write_shards

VIDEOS = [bytes([65 + i]) * (700 + 300 * i) for i in range(7)]  # the index does not look into them


@pytest.fixture
def shards(tmp_path: Path) -> Artifact:
    return write_shards(tmp_path / "shards", VIDEOS, per_shard=3, trims={4: (1.5, 2.25)})


def test_attributes(shards: Artifact) -> None:
    index = ShardIndex.open(shards)
    assert (index.domain, index.split, index.task) == ("tiny", "train", "single_label")
    assert index.classes == ("a", "b", "c")
    assert index.digest == shards.digest
    assert len(index) == 7
    assert index.keys == [f"clip/{i:03d}" for i in range(7)]
    assert index.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert index.shard_of.tolist() == [0, 0, 0, 1, 1, 1, 2]


def test_reads_each_clip(shards: Artifact) -> None:
    index = ShardIndex.open(shards)
    for i in (6, 0, 4, 4, 2):
        assert index.read(i)["mp4"] == VIDEOS[i]
        metadata, video = index.clip(i)
        assert video == VIDEOS[i]
        assert metadata["key"] == index.keys[i]
    assert index.clip(4)[0]["trim"] == [1.5, 2.25]


def test_reads_only_the_clips_range(shards: Artifact) -> None:
    index = ShardIndex.open(shards)
    path = shards.path / index.files[0]
    content = bytearray(path.read_bytes())
    first, size = int(index.offsets[1]), int(index.sizes[1])
    content[:first] = bytes(first)
    content[first + size :] = bytes(len(content) - first - size)
    path.write_bytes(content)
    assert index.read(1)["mp4"] == VIDEOS[1]
    with pytest.raises(MdlError, match="damaged"):
        index.clip(0)


def test_travels_to_other_processes(shards: Artifact) -> None:
    index = pickle.loads(pickle.dumps(ShardIndex.open(shards)))
    assert index.read(5)["mp4"] == VIDEOS[5]
    assert np.array_equal(index.shard_of, ShardIndex.open(shards).shard_of)


def test_importing_it_is_light() -> None:
    code = "import sys, mdltool.data.index; sys.exit('torch' in sys.modules or 'av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def rewritten(shards: Artifact, change: Callable[[dict[str, Any]], object]) -> Artifact:
    path = shards.path / "index.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    manifest = shards.manifest
    manifest["files"]["index.json"] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    (shards.path / "artifact.json").write_text(json.dumps(manifest))
    return open_artifact(shards.path)


def member(content: dict[str, Any], number: int = 0) -> dict[str, Any]:
    return content["shards"][0]["members"][number]


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "outside": (lambda c: member(c).update(offset=10**6), "points outside"),
    "too long": (lambda c: member(c, 2).update(size=10**6), "points outside"),
    "overflowing": (lambda c: member(c).update(offset=2**63 - 1, size=2**63 - 1), "points outside"),
    "beyond 64 bits": (lambda c: member(c).update(offset=2**70), "too large"),
    "negative": (lambda c: member(c).update(offset=-512), "points outside"),
    "empty": (lambda c: member(c).update(size=0), "points outside"),
    "text for a number": (lambda c: member(c).update(offset="0"), "'offset' is '0', not int"),
    "a fraction": (lambda c: member(c).update(size=1.5), "'size' is 1.5, not int"),
    "no key": (lambda c: member(c).pop("key"), "'key' is missing"),
    "no domain": (lambda c: c.pop("domain"), "'domain' is missing"),
    "text for the classes": (lambda c: c.update(classes="abc"), "'classes' is 'abc', not list"),
    "an unknown label": (lambda c: member(c).update(label=3), "a label is outside the class list"),
    "a negative label": (lambda c: member(c).update(label=-1), "a label is outside the class list"),
    "a key twice": (lambda c: member(c).update(key="clip/001"), "two clips have the same key"),
    "a list of nothing": (lambda c: c.update(shards=[None]), "'file' is missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_refuses_an_index_that_does_not_fit(shards: Artifact, fault: str) -> None:
    change, reason = FAULTS[fault]
    with pytest.raises(MdlError, match=reason):
        ShardIndex.open(rewritten(shards, change))


def given(task: str, labels: list[Any]) -> Callable[[dict[str, Any]], None]:
    """A change of the index: the task, and the labels of the first clips; the others get the last one's."""

    def change(content: dict[str, Any]) -> None:
        content["task"] = task
        content |= {"verbs": 1, "actions": [[0, 0], [0, 1]]} if task == "verb_noun" else {}
        members = [m for shard in content["shards"] for m in shard["members"]]
        for i, m in enumerate(members):
            m["label"] = labels[min(i, len(labels) - 1)]

    return change


def test_labels_of_several_classes(shards: Artifact) -> None:
    index = ShardIndex.open(rewritten(shards, given("multi_label", [[0, 2], [], [1], [0, 1, 2]])))
    assert (index.task, index.labels.dtype) == ("multi_label", np.float32)
    assert index.labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0], *[[1, 1, 1]] * 4]


def test_labels_that_are_values(shards: Artifact) -> None:
    index = ShardIndex.open(rewritten(shards, given("regression", [[0.1, -2, 3e38], [0, 0.0, 1]])))
    assert (index.task, index.labels.dtype) == ("regression", np.float32)
    assert np.array_equal(index.labels, np.array([[0.1, -2, 3e38], *[[0, 0, 1]] * 6], np.float32))


def test_labels_that_are_a_verb_and_a_noun(shards: Artifact) -> None:
    index = ShardIndex.open(rewritten(shards, given("verb_noun", [[0, 1], [0, 0]])))
    assert (index.task, index.labels.dtype, index.space.verbs) == ("verb_noun", np.int64, 1)
    assert index.labels.tolist() == [[0, 1], *[[0, 0]] * 6]
    assert index.space.actions == ((0, 0), (0, 1))


PAIR_FAULTS = {
    "no number of verbs": ({"verbs": "1"}, "'verbs' is '1', not int"),
    "no noun": ({"verbs": 3}, "the pair .* is outside the class list"),
    "no actions": ({"actions": []}, "not each valid pair once and in order"),
    "an action twice": ({"actions": [[0, 0], [0, 0]]}, "not each valid pair once and in order"),
    "out of order": ({"actions": [[0, 1], [0, 0]]}, "not each valid pair once and in order"),
    "no pairs": ({"actions": [3]}, "3 is no pair"),
}


@pytest.mark.parametrize("fault", PAIR_FAULTS)
def test_refuses_verbs_and_actions_that_do_not_fit(shards: Artifact, fault: str) -> None:
    change, reason = PAIR_FAULTS[fault]
    with pytest.raises(MdlError, match=f"these shards are damaged: .*{reason}"):
        ShardIndex.open(rewritten(shards, lambda c: (given("verb_noun", [[0, 0]])(c), c.update(change))))


@pytest.mark.parametrize("task", ["multi_label", "regression"])
def test_no_clips_have_labels_of_the_right_width(shards: Artifact, task: str) -> None:
    index = ShardIndex.open(rewritten(shards, lambda c: c.update(task=task, shards=[])))
    assert index.labels.shape == (0, 3)


LABEL_FAULTS: list[tuple[str, Any, str]] = [
    ("multi_label", 1, "'label' is 1, not list"),
    ("multi_label", [3], "a label is outside the class list"),
    ("multi_label", [-1, 0], "a label is outside the class list"),
    ("multi_label", [2**70], "too large"),
    ("multi_label", [0, 0], "not each class once and in order"),
    ("multi_label", [2, 1], "not each class once and in order"),
    ("multi_label", ["0"], "not a list of class numbers"),
    ("multi_label", [True], "not a list of class numbers"),
    ("multi_label", [0.0], "not a list of class numbers"),
    ("regression", 0.5, "'label' is 0.5, not list"),
    ("regression", [0.5, 1.0], "'label' has 2 values for 3 targets"),
    ("regression", [0.5, 1.0, float("nan")], "not a list of numbers"),
    ("regression", [0.5, 1.0, float("inf")], "not a list of numbers"),
    ("regression", [0.5, 1.0, 1e39], "not a list of numbers"),
    ("regression", [0.5, 1.0, 10**400], "not a list of numbers"),
    ("regression", [0.5, 1.0, "2"], "not a list of numbers"),
    ("regression", [0.5, 1.0, None], "not a list of numbers"),
    ("single_label", [0], r"'label' is \[0\], not int"),
    ("captions", 0, "there is no task 'captions'"),
    ("verb_noun", 0, "'label' is 0, not list"),
    ("verb_noun", [0], r"\[0\] is no pair of a verb's and a noun's number"),
    ("verb_noun", [0, True], "is no pair of a verb's and a noun's number"),
    ("verb_noun", [1, 0], r"the pair \[1, 0\] is outside the class list"),
    ("verb_noun", [0, -1], r"the pair \[0, -1\] is outside the class list"),
]


@pytest.mark.parametrize(("task", "label", "reason"), LABEL_FAULTS)
def test_refuses_labels_that_do_not_fit_the_task(shards: Artifact, task: str, label: Any, reason: str) -> None:
    with pytest.raises(MdlError, match=f"these shards are damaged: .*{reason}"):
        ShardIndex.open(rewritten(shards, given(task, [label])))


def test_refuses_files_elsewhere(shards: Artifact, tmp_path: Path) -> None:
    (tmp_path / "secret.tar").write_bytes(b"x" * 4096)
    artifact = rewritten(shards, lambda c: c["shards"][0].update(file="../secret.tar"))
    with pytest.raises(MdlError, match=r"no file '\.\./secret\.tar'"):
        ShardIndex.open(artifact)


def test_refuses_another_clips_members(shards: Artifact) -> None:
    artifact = rewritten(shards, lambda c: (member(c, 0).update(key="x"), member(c, 1).update(key="clip/000")))
    index = ShardIndex.open(artifact)
    for i in (0, 1):
        with pytest.raises(MdlError, match="lies where the clip"):
            index.clip(i)


def test_refuses_metadata_of_another_clip(shards: Artifact) -> None:
    path = shards.path / "tiny-000000.tar"
    path.write_bytes(path.read_bytes().replace(b'{"key": "clip/000"', b'{"key": "clip/002"'))
    with pytest.raises(MdlError, match="metadata of 'clip/000' belongs to another clip"):
        ShardIndex.open(shards).clip(0)


def test_never_follows_a_link(shards: Artifact) -> None:
    index = ShardIndex.open(shards)
    path = shards.path / index.files[0]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("clip/000.mp4", "clip/000.json"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    with pytest.raises(MdlError, match="lies where the clip"):
        index.read(0)


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    draft = begin(tmp_path / "model", kind="model", stage="train", inputs=[], request={})
    assert not isinstance(draft, Artifact)
    with pytest.raises(MdlError, match="a model artifact, not shards"):
        ShardIndex.open(draft.commit({}))


def test_a_shard_that_vanished(shards: Artifact) -> None:
    index = ShardIndex.open(shards)
    (shards.path / index.files[2]).unlink()
    with pytest.raises(MdlError, match="cannot be read"):
        index.read(6)
    (shards.path / index.files[1]).write_bytes(b"")
    with pytest.raises(MdlError, match="ends too early"):
        index.read(3)
