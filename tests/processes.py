"""Processes that run mdltool or a module of tests, without the seconds that an interpreter takes to load torch."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any


@functools.cache
def _spawner() -> socket.socket:
    """The socket of this test process's spawner, which ends with it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        subprocess.Popen(
            [sys.executable, "-m", "tests.spawner", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
    return ours


def _ask(what: Any, *files: int) -> Any:
    socket.send_fds(_spawner(), [json.dumps(what).encode()], files)
    answer = _spawner().recv(1 << 10)
    assert answer, "the spawner has ended"
    return json.loads(answer)


class Process:
    """`python -m WORDS` in a process of its own, as subprocess.Popen has them. env: beside this environment."""

    def __init__(self, *words: object, env: dict[str, str] | None = None) -> None:
        self.returncode: int | None = None
        self._out = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._err = tempfile.TemporaryFile("w+")  # noqa: SIM115
        program = {"words": list(map(str, words)), "env": {**os.environ, **(env or {})}, "cwd": os.getcwd()}
        self.pid: int = _ask(program, self._out.fileno(), self._err.fileno())

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask(self.pid)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """(stdout, stderr) once it has ended. Raises TimeoutError."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise TimeoutError(f"process {self.pid} runs after {timeout} s")
            time.sleep(0.005)
        for file in (self._out, self._err):
            file.seek(0)
        return self._out.read(), self._err.read()


def start(world: int, *words: object, threads: int = 1) -> list[Process]:
    """`python -m WORDS` once for each rank, joined by loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(threads)}
    return [Process(*words, env={**shared, "WORLD_SIZE": str(world), "RANK": str(rank)}) for rank in range(world)]
