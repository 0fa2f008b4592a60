"""The shard stage stopped half-way, and what it refuses to begin."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mdltool.artifact import open_artifact
from mdltool.data.encode import Encoding
from mdltool.data.tar import TarWriter
from mdltool.errors import MdlError
from mdltool.stages.shard import Writing, run
from tests.conftest import Ran
from tests.data.tiny_shards import make_video
from tests.stages.class_folders import SMALL, contents, dataset, make_videos


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_videos(tmp_path_factory.mktemp("videos"))


class TestInterrupted:
    @pytest.fixture
    def disk_fills(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
        def after(size: int) -> None:
            write, written = TarWriter._write, 0

            def failing(self: TarWriter, data: bytes | memoryview) -> None:
                nonlocal written
                written += len(data)
                if written > size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard")
                write(self, data)

            monkeypatch.setattr(TarWriter, "_write", failing)

        return after

    def test_a_full_disk_keeps_what_is_finished(
        self,
        videos: Path,
        tmp_path: Path,
        disk_fills: Callable[[int], None],
        monkeypatch: pytest.MonkeyPatch,
        mdltool: Callable[..., Ran],
    ) -> None:
        words = ["shard", videos, "--format", "folder", "--domain", "d", "--split", "train", "--shard-size", "12KB"]
        words += ["--out", tmp_path / "out"]
        disk_fills(40_000)
        ran = mdltool(*words)
        assert (ran.code, ran.out) == (1, "")
        assert "No space left" in ran.err
        assert "run the same command again" in ran.err
        finished = len(list((tmp_path / "out.partial").glob("*.done.json")))
        assert finished > 0
        monkeypatch.undo()
        ran = mdltool(*words)
        assert f"resuming: {finished} of" in ran.err
        fresh = run(dataset(videos), tmp_path / "fresh", Writing(shard_bytes=SMALL))
        assert contents(open_artifact(ran.path)) == contents(fresh)

    def test_what_a_kill_leaves_half_written_does_not_come_in(self, videos: Path, tmp_path: Path) -> None:
        source = tmp_path / "videos"
        shutil.copytree(videos, source)
        mended = source / "box" / "mended.mp4"
        mended.touch()
        with pytest.raises(MdlError, match="cannot be used"):
            run(dataset(source), tmp_path / "out", Writing(shard_bytes=SMALL))
        mended.write_bytes(make_video(9))
        partial = tmp_path / "out.partial"
        for name in ("artifact.json.tmp", "index.json.tmp", "shard-000000.tar.tmp", "shard-000099.tar"):
            (partial / name).write_text("half")
        (partial / "scratch-old").mkdir()
        resumed = run(dataset(source), tmp_path / "out", Writing(shard_bytes=SMALL))
        assert contents(resumed) == contents(run(dataset(source), tmp_path / "fresh", Writing(shard_bytes=SMALL)))

    @pytest.mark.parametrize("mode", ["copy", "jpeg"])
    def test_killed_and_run_again_gives_the_same_bytes(self, videos: Path, tmp_path: Path, mode: str) -> None:
        out, command = _command(videos, tmp_path, mode)
        kills = [_kill_when(command, lambda n=n: _finished(out) > n) for n in (0, 2, 4)]
        assert kills.count(True) >= 2
        _check_whole(command, out, videos, tmp_path, mode)

    @pytest.mark.full
    @pytest.mark.parametrize("mode", ["copy", "h264"])
    def test_killed_twenty_times(self, videos: Path, tmp_path: Path, mode: str) -> None:
        out, command = _command(videos, tmp_path, mode)
        rng, kills = random.Random(7), 0
        for _ in range(100):
            moment = time.monotonic() + rng.uniform(0.05, 0.8)
            kills += _kill_when(command, lambda: time.monotonic() > moment)  # noqa: B023 - used before the next
            if kills == 20:
                break
            if out.exists() and rng.random() < 0.9:
                shutil.rmtree(out)
        assert kills == 20
        _check_whole(command, out, videos, tmp_path, mode)


def _command(videos: Path, folder: Path, mode: str) -> tuple[Path, list[str]]:
    out = folder / "out"
    options = ["--format", "folder", "--domain", "d", "--split", "train", "--workers", "2"]
    options += ["--encode", mode, "--shard-size", str(SMALL), "--out", str(out)]
    return out, [sys.executable, "-m", "mdltool", "shard", str(videos), *options]


def _kill_when(command: list[str], moment: Callable[[], bool]) -> bool:
    """Run a command and kill it when the moment has come; whether it was still running."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not moment():
        time.sleep(0.0005)
    process.kill()
    return process.wait() == -signal.SIGKILL


def _finished(out: Path) -> int:
    partial = out.with_name(out.name + ".partial")
    return len(list(partial.glob("*.done.json"))) if partial.exists() else 0


def _check_whole(command: list[str], out: Path, videos: Path, folder: Path, mode: str) -> None:
    """The command completes now, and what it made is what an undisturbed run makes."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fresh = run(dataset(videos), folder / "fresh", Writing(Encoding(mode), SMALL))
    assert contents(open_artifact(out)) == contents(fresh)
    assert open_artifact(out).digest == fresh.digest
    assert not out.with_name("out.partial").exists()


class TestRefusals:
    def test_an_out_that_holds_something_else(self, videos: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").touch()
        with pytest.raises(MdlError, match="holds something else"):
            run(dataset(videos), tmp_path / "out")
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]

    def test_two_at_a_time(self, videos: Path, tmp_path: Path) -> None:
        holder = (
            "import sys, time; from pathlib import Path; from mdltool.artifact import begin;"
            "held = begin(Path(sys.argv[1]), kind='shards', stage='shard', inputs=(), request={});"
            "print('held', flush=True); time.sleep(60)"
        )
        command = [sys.executable, "-c", holder, str(tmp_path / "out")]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            with pytest.raises(MdlError, match="another process is writing"):
                run(dataset(videos), tmp_path / "out")
            process.kill()

    @pytest.mark.parametrize(
        ("words", "what"),
        [
            (("none", "--format", "folder"), "no such directory"),
            ((".", "--format", "foldr"), "did you mean 'folder'"),
            ((".", "--format", "folder", "--encode", "h265"), "did you mean 'h264'"),
            ((".", "--format", "folder", "--verify", "all"), "one of: decode, probe"),
            ((".", "--format", "folder", "--shard-size", "big"), "'big' is no size"),
            ((".", "--format", "folder", "--shard-size", "0"), "'0' is no size"),
            ((".", "--format", "folder", "--part", "2/2"), "'2/2' is no part"),
            ((".", "--format", "folder", "--max-bad", "5"), "'5' is no share"),
            ((".", "--format", "folder", "--domain", "UCF101"), "'UCF101' cannot be a domain's name"),
            ((".", "--format", "folder", "--domain", "shared"), "'shared' cannot be a domain's name"),
            ((".", "--format", "folder", "--split", "a/b"), "'a/b' cannot be a name"),
            ((".", "--format", "csv"), "the CSV file is not given"),
        ],
    )
    def test_one_message_and_nothing_written(
        self,
        videos: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        mdltool: Callable[..., Ran],
        words: tuple[str, ...],
        what: str,
    ) -> None:
        monkeypatch.chdir(videos)
        ran = mdltool("shard", "--domain", "d", "--split", "train", "--work", tmp_path, *words)
        assert (ran.code, ran.out) == (1, "")
        assert ran.err.startswith("error: ")
        assert what in ran.err
        assert "Traceback" not in ran.err
        assert os.listdir(tmp_path) == []

    def test_missing_options_are_a_fault_of_usage(self, videos: Path, mdltool: Callable[..., Ran]) -> None:
        ran = mdltool("shard", videos, "--format", "folder")
        assert ran.code == 2
        assert "--domain, --split" in ran.err
