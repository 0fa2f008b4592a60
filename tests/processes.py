"""Several processes that train together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def start(world: int, *words: object, threads: int = 1) -> list[subprocess.Popen[str]]:
    """`python -m WORDS` once for each rank, joined by loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(threads)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", *map(str, words)],
            env={**os.environ, **shared, "WORLD_SIZE": str(world), "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
