"""A process that has torch and mdltool loaded and copies itself for each program: `python -m tests.spawner FD`.

A new interpreter takes seconds to load them. The copies are processes like any other: with their own memory,
environment, output and signals, begun from a state in which nothing but imports has happened.
Over the socket FD come a program (its two output files with it), answered by its process's number, and such
numbers, answered by the exit status or null while it runs.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import sys
from typing import Any

MODULES = (
    "accelerate.optimizer",
    "mdltool.cli.main",
    "mdltool.stages.evaluate",
    "mdltool.stages.train",
    "torch._dynamo",
    "torch.utils.tensorboard",
)


def served(channel: socket.socket) -> dict[str, Any] | None:
    """Answer until the other end closes: None. In each copy: the program to be."""
    while True:
        message, files, _, _ = socket.recv_fds(channel, 1 << 20, 2)
        if not message:
            return None
        asked = json.loads(message)
        if isinstance(asked, int):
            pid, status = os.waitpid(asked, os.WNOHANG)
            channel.send(json.dumps(os.waitstatus_to_exitcode(status) if pid else None).encode())
            continue
        pid = os.fork()
        if pid == 0:
            for number, file in enumerate(files, 1):
                os.dup2(file, number)
        for file in files:
            os.close(file)
        if pid == 0:
            channel.close()
            return dict(asked)
        channel.send(json.dumps(pid).encode())


def become(program: dict[str, Any]) -> None:
    """Run a module as the program that `python -m` starts."""
    import torch

    os.environ.clear()
    os.environ.update(program["env"])
    os.chdir(program["cwd"])
    # read by torch when it was loaded
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    module, *words = program["words"]
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    for name in MODULES:
        __import__(name)
    found = served(socket.socket(fileno=int(sys.argv[1])))
    if found is not None:
        become(found)
