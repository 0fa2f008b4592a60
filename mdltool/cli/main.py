"""The entry point: collects the commands and turns failures into exit codes."""

from __future__ import annotations

import errno
import importlib
import io
import os
import re
import sys
from typing import Annotated, NoReturn

import typer

from mdltool import __version__
from mdltool.errors import Elsewhere, MdlError, Stopped

# The order of the help. Each module offers `register(app)`; none imports anything heavy at its top.
COMMANDS = (
    "demo",
    "doctor",
    "synth",
    "shard",
    "overlap",
    "backbone",
    "recipe",
    "describe",
    "train",
    "compress",
    "add_domain",
    "add_modality",
    "model",
    "fuse",
    "evaluate",
    "predict",
    "report",
    "inspect",
)

app = typer.Typer(
    name="mdltool",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Multi-domain action recognition: one backbone, small adapters per video domain.",
    epilog="Start with: mdltool demo",
)


def _version(value: bool) -> None:
    if value:
        print(f"mdltool {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of every error; goes anywhere in the line.")
    ] = False,
) -> None:
    """`main` takes --debug out of the line before."""


for _name in COMMANDS:
    importlib.import_module(f"mdltool.cli.{_name}").register(app)


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 the user can fix it, 2 usage, 70 our defect, 75 stopped."""
    words, debug = _without_debug(sys.argv[1:])
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # paths pass through, which need not be UTF-8
    # Before torch loads its OpenMP: threads that spin while they wait take the cores that decode the next batch.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app(words)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        _leave_processes(75)
        sys.exit(75)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except SystemExit as end:
        if end.code == 130:  # typer's answer to the same
            print("interrupted", file=sys.stderr)
        if not end.code:
            _leave_processes(0)
        raise
    except BrokenPipeError:
        # the reader went away (| head); there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        fault = _for_the_user(error)
        if fault is None:
            _report_defect()
        if debug:
            raise
        if not isinstance(fault, Elsewhere):
            print(f"error: {fault}", file=sys.stderr)
        sys.exit(1)


def _without_debug(words: list[str]) -> tuple[list[str], bool]:
    """(the line without its --debug, whether it had one). What follows -- is no option."""
    end = words.index("--") if "--" in words else len(words)
    options = [word for word in words[:end] if word != "--debug"]
    return [*options, *words[end:]], len(options) < end


def _for_the_user(error: Exception) -> MdlError | None:
    """The message of what no defect is, but the system, another process or a reader of clips; None: a defect."""
    if isinstance(error, MdlError):
        return error
    if isinstance(error, OSError):
        return _refusal(error)
    text = str(error)
    # Libraries written in Rust (safetensors) raise errors of their own for what the system refused.
    if refused := re.search(r"\(os error (\d+)\)", text):
        return _refusal(OSError(int(refused[1]), os.strerror(int(refused[1]))))
    # What a collective says when a process at its other end is gone.
    if os.environ.get("WORLD_SIZE", "1") != "1" and any(word in text for word in ("gloo", "NCCL")):
        fix = "it says why, unless it was killed; checkpoints are kept: --resume"
        return MdlError("another process has ended", None, fix)
    # torch raises this wherever the main thread is when a process that reads clips dies.
    if "DataLoader worker" in text:
        fix = "it may have run out of memory: start again with fewer --workers"
        return MdlError("a process that reads clips has ended", text, fix)
    return None


def _refusal(error: OSError) -> MdlError:
    """What the system refused, and what helps."""
    fixes = {
        errno.ENOSPC: "free some space, then run the same command again, a training with --resume"
        ": finished work is kept",
        errno.EFBIG: "a limit of files' sizes is reached: raise it (ulimit -f), or give an --out elsewhere",
        errno.EDQUOT: "your quota is used up: free some space, then run the same command again",
        errno.EACCES: "check the permissions, or give another --out",
        errno.EROFS: "this file system is read-only: give another --out",
        errno.ENAMETOOLONG: "give a shorter --out",
    }
    return MdlError(error.strerror or str(error), error.filename, fixes.get(error.errno or 0, "check the path"))


def _report_defect() -> NoReturn:
    import traceback

    traceback.print_exc()
    print(f"\nThis is a defect of mdltool {__version__}. Please report it with the lines above.", file=sys.stderr)
    sys.exit(70)


def _leave_processes(code: int) -> None:
    """Leave the process group, where there is one, and end at once with a code.

    Threads of a group's transport may ask for the interpreter while it ends, which aborts the process now and then;
    a scheduler would take that for a failure.
    """
    if "torch.distributed" not in sys.modules:
        return
    from mdltool.data.ahead import end_workers
    from mdltool.train.distributed import leave_world

    if leave_world():
        end_workers()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
