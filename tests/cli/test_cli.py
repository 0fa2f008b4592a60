"""The command line's manners: fast help, examples, exit codes, pipes, --json (design, section 6)."""

from __future__ import annotations

import errno
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mdltool import console
from mdltool.cli.main import app
from mdltool.errors import MdlError
from tests.conftest import Ran, World

MDLTOOL = [sys.executable, "-m", "mdltool"]


def leaves(group: Any = app, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for command in group.registered_commands:
        yield (*path, command.name), command
    for child in group.registered_groups:
        yield from leaves(child.typer_instance, (*path, child.name))


LEAVES = dict(leaves())


def test_help_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; sys.argv = ['mdltool', '--help']\n"
        "from mdltool.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'av', 'yaml', 'pydantic', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "describe" in ran.stdout


def test_every_command_of_the_table_is_there() -> None:
    single = "demo doctor synth shard overlap describe train compress add-domain fuse add-modality eval predict"
    grouped = {
        "backbone": {"list", "show", "fetch", "import", "pretrain"},
        "recipe": {"list", "show", "copy", "validate"},
        "model": {"split", "merge", "rm"},
    }
    expected = {(name,) for name in (*single.split(), "report", "inspect")}
    expected |= {(group, name) for group, names in grouped.items() for name in names}
    assert set(LEAVES) == expected


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_command_has_an_example_and_json(path: tuple[str, ...], mdltool: Callable[..., Ran]) -> None:
    ran = mdltool(*path, "--help")
    assert ran.code == 0
    assert f"mdltool {' '.join(path)}" in " ".join(ran.out.split("Example", 1)[1].split())
    assert "as_json" in inspect.signature(LEAVES[path].callback).parameters


def test_usage_errors_exit_with_2(mdltool: Callable[..., Ran]) -> None:
    assert mdltool("train").code == 2
    assert mdltool("trane").code == 2
    assert mdltool("train", "--recipe", "x", "--nonsense").code == 2


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("describe", "omi_x3dm_al"), ("no recipe 'omi_x3dm_al'", "did you mean 'omi_x3dm_all'")),
        (("describe", "tiny_demo", "--set", "train.sed=1"), ("train.sed: unknown key", "'seed'")),
        (("describe", "tiny_pretrain"), ("does not say how many classes", "--set domains.source.classes=N")),
        (("describe", "tiny_demo", "--views", "3x2"), ("'3x2' is no choice of views",)),
        (("inspect", "nowhere"), ("no such directory", "give the path of an artifact")),
        (("inspect", "."), ("not an artifact",)),
        (("eval", "nowhere"), ("no such directory",)),
        (("backbone", "show", "x3d"), ("no backbone 'x3d'", "did you mean")),
        (("backbone", "import", "x3d_m", "--file", "nowhere.pyth"), ("no such file",)),
        (("backbone", "import", "x3d_m", "--file", "x", "--tag", "../x"), ("'../x' cannot be a tag",)),
        (("recipe", "list", "--family", "omni"), ("no family 'omni'", "did you mean 'omi'")),
        (("recipe", "show", "nowhere.yaml"), ("no such recipe file",)),
        (
            ("recipe", "validate", "tiny_demo", "--set", "adapters=[{type: mhva}]"),
            ("no site for the adapter 'mhva'", "attention or mlp", "offers sites of kind conv, stage"),
        ),
    ],
)
def test_bad_input_is_one_message_and_exit_code_1(
    words: tuple[str, ...], parts: tuple[str, ...], mdltool: Callable[..., Ran]
) -> None:
    ran = mdltool(*words)
    assert ran.code == 1
    assert ran.out == ""
    assert ran.err.startswith("error: ")
    assert "Traceback" not in ran.err
    assert all(part in ran.err for part in parts), ran.err


def test_what_the_system_refused_a_library_is_a_message(
    mdltool: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors raises an error of its own where it cannot write."""
    import mdltool.stages.describe as stage

    nowhere = tmp_path / "nowhere" / "a.safetensors"
    monkeypatch.setattr(stage, "run", lambda *_: save_file({"a": torch.zeros(2)}, nowhere))
    ran = mdltool("describe", "tiny_demo")
    assert (ran.code, "Traceback" in ran.err) == (1, False), ran.err
    assert ran.err.startswith("error: No such file or directory\n  fix:")


def test_a_copy_that_fails_leaves_no_file(
    mdltool: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert mdltool("recipe", "copy", "tiny_demo", tmp_path / "mine.yaml").code == 1
    assert not list(tmp_path.iterdir())


def test_ctrl_c_is_130_and_a_word(mdltool: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    import mdltool.stages.describe as stage

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "run", interrupted)
    ran = mdltool("describe", "tiny_demo")
    assert (ran.code, ran.out, ran.err.strip()) == (130, "", "interrupted")


def test_brackets_in_a_table_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    console.table("a [b]", ("[c]",), [("[/d]",), ("mdltool[flow]",)], to_stdout=True)
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("a [b]", "[c]", "[/d]", "mdltool[flow]"))


def test_defects_exit_with_70_and_a_traceback(mdltool: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    import mdltool.stages.describe as stage

    monkeypatch.setattr(stage, "run", lambda *_: 1 / 0)
    ran = mdltool("describe", "tiny_demo")
    assert ran.code == 70
    assert "ZeroDivisionError" in ran.err
    assert "defect of mdltool" in ran.err


@pytest.mark.parametrize("words", [("--debug", "describe", "tiny_dmo"), ("describe", "tiny_dmo", "--debug")])
def test_debug_goes_anywhere(words: tuple[str, ...], mdltool: Callable[..., Ran]) -> None:
    with pytest.raises(MdlError, match="no recipe 'tiny_dmo'"):  # which Python prints with its traceback
        mdltool(*words)


def test_debug_may_be_an_argument(mdltool: Callable[..., Ran]) -> None:
    ran = mdltool("recipe", "show", "--", "--debug")
    assert (ran.code, "no recipe '--debug'" in ran.err) == (1, True)


def test_a_full_disk_is_a_message(mdltool: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    import mdltool.stages.describe as stage

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere")

    monkeypatch.setattr(stage, "run", full)
    ran = mdltool("describe", "tiny_demo")
    assert ran.code == 1
    assert "No space left on device\n  where: /somewhere\n  fix:   free some space" in ran.err
    assert "finished work is kept" in ran.err


@pytest.mark.parametrize(
    "words",
    [
        ("recipe", "list"),
        ("recipe", "show", "tiny_demo"),
        ("recipe", "validate", "tiny_demo", "omi_x3dm_all"),
        ("describe", "omi_x3dm_all"),
        ("backbone", "list"),
        ("backbone", "show", "x3d_tiny"),
        ("doctor",),
    ],
)
def test_json_is_one_object(words: tuple[str, ...], mdltool: Callable[..., Ran]) -> None:
    assert isinstance(mdltool(*words, "--json").json, dict)


def test_the_keys_of_describe(mdltool: Callable[..., Ran]) -> None:
    found = mdltool("describe", "omi_x3dm_all", "--json").json
    assert {"recipe", "parameters", "per_domain", "percent_of_backbone", "gflops", "published"} <= set(found)
    parts = {
        "total",
        "backbone",
        "heads",
        "adapters",
        "norms",
        "streams",
        "projection",
        "training_only",
        "trainable",
    }
    assert parts <= set(found["parameters"])
    assert set(found["gflops"]) >= {"view", "video", "views"}


def test_recipe_list_shows_the_published_numbers(mdltool: Callable[..., Ran]) -> None:
    rows = {row["name"]: row for row in mdltool("recipe", "list", "--json").json["recipes"]}
    assert rows["omi_x3dm_2plus1d_all"]["top1"] == {"hmdb51": 74.77, "ucf101": 96.25, "k400": 69.84}
    assert "Table 3, all" in rows["omi_x3dm_2plus1d_all"]["rows"]


def test_copies_of_recipes_are_valid_and_overwrite_nothing(mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    assert mdltool("recipe", "copy", "omi_x3dm_all", target).out.strip() == str(target)
    assert mdltool("recipe", "validate", target).code == 0
    ran = mdltool("recipe", "copy", "tiny_demo", target)
    assert ran.code == 1
    assert "there already" in ran.err


def pipe(first: list[str], second: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """first | second, as a shell runs it."""
    writer = subprocess.Popen(first, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=cwd)
    return subprocess.run(second, stdin=writer.stdout, capture_output=True, text=True, cwd=cwd, check=False)


def test_paths_pass_by_pipe(world: World, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    """shard | train | eval, with and without --json between."""
    train = [*MDLTOOL, *world.train_words(), "--out", str(tmp_path / "model")]
    shard = [*MDLTOOL, "shard", str(world.videos / "chalk" / "train"), "--format", "folder", "--domain", "chalk"]
    shard += ["--split", "train", "--work", str(world.work)]
    ran = pipe(shard, train, tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == str(tmp_path / "model")
    evaluate = [*MDLTOOL, "eval", "--views", "1x1", "--work", str(world.work), "--out", str(tmp_path / "eval")]
    ran = pipe([*train, "--json"], evaluate, tmp_path)
    assert ran.returncode == 0, ran.stderr
    found = mdltool("inspect", ran.stdout.strip(), "--json").json
    assert found["kind"] == "eval"


def test_an_empty_pipe_is_an_error_and_no_fallback(world: World, tmp_path: Path) -> None:
    (world.work / "model").mkdir(exist_ok=True)
    failing = [*MDLTOOL, "train", "--recipe", "no_such_recipe"]
    ran = pipe(failing, [*MDLTOOL, "eval", "--work", str(world.work)], tmp_path)
    assert ran.returncode == 1
    assert "the pipe is empty" in ran.stderr
    assert ran.stdout == ""


def test_paths_need_not_be_utf_8(world: World, tmp_path: Path) -> None:
    odd, strict = os.fsencode(tmp_path / "x") + b"\xff", {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    words = ["--format", "folder", "--domain", "chalk", "--split", "val", "--out", odd]
    shard = [*MDLTOOL, "shard", str(world.videos / "chalk" / "val"), *words]
    ran = subprocess.run(shard, env=strict, capture_output=True, check=True)
    assert ran.stdout == odd + b"\n"
    ran = subprocess.run([*MDLTOOL, "eval"], env=strict, input=odd, capture_output=True, check=False)
    assert ran.returncode == 1
    assert b"of kind shards, not model" in ran.stderr


def test_the_wrong_kind_by_pipe_is_refused(world: World, tmp_path: Path) -> None:
    ran = subprocess.run(
        [*MDLTOOL, "eval", "--work", str(world.work)],
        input=str(world.shards("chalk", "val")),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert ran.returncode == 1
    assert "of kind shards, not model" in ran.stderr


def test_version(mdltool: Callable[..., Ran]) -> None:
    from mdltool import __version__

    assert mdltool("--version").out == f"mdltool {__version__}\n"


def test_json_objects_parse_line_by_line_in_scripts() -> None:
    ran = subprocess.run([*MDLTOOL, "recipe", "validate", "tiny_demo", "--json"], capture_output=True, check=False)
    assert json.loads(ran.stdout) == {"valid": ["tiny_demo"]}
