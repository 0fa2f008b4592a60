"""Artifact directories: whole or not there, refused when they are something else (design, section 5)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mdltool.artifact import Artifact, Draft, begin, latest, open_artifact, partial_path
from mdltool.errors import MdlError


def start(
    out: Path, request: dict | None = None, resume: str = "never", inputs: list | None = None
) -> Draft | Artifact:
    return begin(
        out,
        kind="model",
        stage="train",
        inputs=inputs or [],
        request={"a": 1} if request is None else request,
        resume=resume,
    )


def make(out: Path, content: str = "hello", request: dict | None = None, log: str = "1 s") -> Artifact:
    draft = start(out, request)
    assert isinstance(draft, Draft)
    (draft.path / "deep").mkdir()
    (draft.path / "deep" / "file.txt").write_text(content)
    (draft.path / "log.txt").write_text(log)
    return draft.commit({"clips": 3}, volatile=("log.txt",))


def test_a_committed_artifact_is_whole_and_verifies(tmp_path: Path) -> None:
    artifact = make(tmp_path / "model" / "m")
    assert artifact.verify() == []
    assert artifact.file("deep/file.txt").read_text() == "hello"
    assert not partial_path(artifact.path).exists()
    assert open_artifact(artifact.path, "model").digest == artifact.digest
    found = latest(tmp_path, "model")
    assert found is not None
    assert found.digest == artifact.digest


def test_the_digest_covers_content_and_inputs_and_not_times(tmp_path: Path) -> None:
    first = make(tmp_path / "1")
    assert make(tmp_path / "2", log="2 s").digest == first.digest
    assert make(tmp_path / "3", content="other").digest != first.digest
    draft = start(tmp_path / "4", inputs=[first.as_input("model")])
    assert isinstance(draft, Draft)
    (draft.path / "deep").mkdir()
    (draft.path / "deep" / "file.txt").write_text("hello")
    assert draft.commit({}).digest != first.digest


@pytest.mark.parametrize("fault", ["changed", "longer", "missing", "manifest"])
def test_verify_finds_every_fault(tmp_path: Path, fault: str) -> None:
    artifact = make(tmp_path / "m")
    path = artifact.path / "deep" / "file.txt"
    if fault == "missing":
        path.unlink()
    elif fault == "manifest":
        manifest = json.loads((artifact.path / "artifact.json").read_text())
        manifest["inputs"] = [{"role": "x", "kind": "model", "path": "y", "digest": "z"}]
        (artifact.path / "artifact.json").write_text(json.dumps(manifest))
    else:
        path.write_text({"changed": "hellO", "longer": "hello!"}[fault])
    assert len(open_artifact(artifact.path).verify()) == 1


def test_an_identical_request_is_answered_with_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = make(tmp_path / "m")
    again = start(tmp_path / "m")
    assert isinstance(again, Artifact)
    assert again.digest == artifact.digest
    assert f"already there and identical: {tmp_path / 'm'}" in capsys.readouterr().err


def test_the_order_of_inputs_tells_no_runs_apart(tmp_path: Path) -> None:
    inputs = [make(tmp_path / name, content=name).as_input("train") for name in ("a", "b")]
    first = start(tmp_path / "m", resume="auto", inputs=inputs)
    assert isinstance(first, Draft)
    first.abandon(keep=True)
    again = start(tmp_path / "m", resume="must", inputs=inputs[::-1])
    assert isinstance(again, Draft)
    again.commit({})
    assert isinstance(start(tmp_path / "m", inputs=inputs[::-1]), Artifact)
    with pytest.raises(MdlError, match="other inputs"):
        start(tmp_path / "m", inputs=inputs[:1])


def test_another_request_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    make(tmp_path / "m", request={"train": {"seed": 1}})
    with pytest.raises(MdlError, match=r"different: train\.seed"):
        start(tmp_path / "m", request={"train": {"seed": 2}})


def test_what_is_cut_off_while_it_becomes_whole_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    draft = start(tmp_path / "m")
    assert isinstance(draft, Draft)
    with monkeypatch.context() as patch:
        patch.setattr("os.rename", killed)
        with pytest.raises(KeyboardInterrupt):
            draft.commit({})
    draft.abandon(keep=True)
    again = start(tmp_path / "m", resume="must")
    assert isinstance(again, Draft)
    assert [path.name for path in again.commit({}).path.iterdir()] == ["artifact.json"]


def test_what_is_no_artifact_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("x")
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "notes").write_text("x")
    for name in ("mine", "file", "other"):
        with pytest.raises(MdlError, match="holds something else"):
            start(tmp_path / name)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"
    assert (tmp_path / "other.partial" / "notes").exists()
    (tmp_path / "empty").mkdir()
    assert make(tmp_path / "empty").verify() == []


def test_two_processes_do_not_build_one_artifact(tmp_path: Path) -> None:
    draft = start(tmp_path / "m")
    assert isinstance(draft, Draft)
    code = (
        "import sys, pathlib; from mdltool.artifact import begin\n"
        "begin(pathlib.Path(sys.argv[1]), kind='model', stage='train', inputs=[], request={'a': 1}, resume='auto')"
    )
    other = [sys.executable, "-c", code, str(tmp_path / "m")]
    ran = subprocess.run(other, capture_output=True, text=True, check=False)
    assert "another process is writing this artifact" in ran.stderr
    draft.abandon()
    assert subprocess.run(other, capture_output=True, check=False).returncode == 0


def test_an_interrupted_build_says_so_and_resumes_only_the_same_request(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib; from mdltool.artifact import begin\n"
        "it = {'kind': 'model', 'stage': 'train', 'inputs': [], 'request': {'a': 1}}\n"
        "d = begin(pathlib.Path(sys.argv[1]), **it, resume='ask' if len(sys.argv) > 2 else 'never')\n"
        "(d.path / 'kept').write_text('x'); os.kill(os.getpid(), 9)"
    )
    for words, fix in ((["resumes"], "the same command with --resume"), ([], "the same command again")):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "m"), *words], check=False)
        with pytest.raises(MdlError, match="'train' was interrupted") as caught:
            open_artifact(tmp_path / "m")
        assert caught.value.fix == f"run {fix}"
    with pytest.raises(MdlError, match="interrupted run is here"):
        start(tmp_path / "m", resume="ask")
    with pytest.raises(MdlError, match="of another request"):
        start(tmp_path / "m", request={"a": 2}, resume="must")
    draft = start(tmp_path / "m", resume="must")
    assert isinstance(draft, Draft)
    assert draft.resumed
    assert (draft.path / "kept").exists()
    draft.abandon(keep=True)
    fresh = start(tmp_path / "m")
    assert isinstance(fresh, Draft)
    assert not (fresh.path / "kept").exists()
    fresh.abandon()
    with pytest.raises(MdlError, match="nothing to resume"):
        start(tmp_path / "m", resume="must")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"schema": 99}, "schema 99"),
        (lambda m: m | {"kind": "eval"}, "of kind eval"),
        (lambda m: {k: v for k, v in m.items() if k != "digest"}, "cannot be read"),
    ],
)
def test_unreadable_artifacts_are_refused(tmp_path: Path, change, message: str) -> None:
    path = make(tmp_path / "m").path / "artifact.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(MdlError, match=message):
        open_artifact(tmp_path / "m", "model")


def test_missing_and_foreign_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MdlError, match="no such directory"):
        open_artifact(tmp_path / "nowhere", "model")
    with pytest.raises(MdlError, match="not an artifact"):
        open_artifact(tmp_path, "model")


@pytest.mark.parametrize("name", ["", ".", "/", ".."])
def test_paths_without_a_name(name: str) -> None:
    with pytest.raises(MdlError, match="not an artifact"):
        open_artifact(name)
    with pytest.raises(MdlError, match="holds something else"):
        start(Path(name))


def test_a_changed_json_file_is_not_read(tmp_path: Path) -> None:
    draft = start(tmp_path / "m")
    assert isinstance(draft, Draft)
    (draft.path / "model.json").write_text('{"a": 1}')
    artifact = draft.commit({})
    assert artifact.load_json("model.json") == {"a": 1}
    for changed in ("{}", '{"a": 2}', "{", ""):
        (tmp_path / "m" / "model.json").write_text(changed)
        with pytest.raises(MdlError, match="not what the stage wrote"):
            artifact.load_json("model.json")


def test_a_header_that_is_being_written_is_no_foreign_file(tmp_path: Path) -> None:
    """Another process has made the directory and the lock, and is about to rename its header."""
    partial = partial_path(tmp_path / "m")
    partial.mkdir()
    (partial / "partial.json.tmp").write_text("{")
    draft = start(tmp_path / "m")
    assert isinstance(draft, Draft)
    assert draft.commit({}).files == {}


def test_a_key_that_is_newer_and_unset_is_no_difference(tmp_path: Path) -> None:
    made = make(tmp_path / "m", request={"a": {"b": 1}})
    newer = {"a": {"b": 1, "c": None}, "d": None}
    again = start(tmp_path / "m", newer)
    assert isinstance(again, Artifact)
    assert again.digest == made.digest
    with pytest.raises(MdlError, match=r"different: a\.c\)"):
        start(tmp_path / "m", {"a": {"b": 1, "c": 2}})
    half = start(tmp_path / "n", {"a": {"b": 1}})
    assert isinstance(half, Draft)
    half.abandon(keep=True)
    resumed = start(tmp_path / "n", newer, resume="must")
    assert isinstance(resumed, Draft)
    assert resumed.resumed


def test_files_outside_the_directory_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    path = make(tmp_path / "m").path / "artifact.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../secret"] = {"bytes": 1, "sha256": "0"}
    path.write_text(json.dumps(manifest))
    artifact = open_artifact(tmp_path / "m")
    with pytest.raises(MdlError, match="no file"):
        artifact.file("../secret")
    assert any("outside" in fault for fault in artifact.verify())
