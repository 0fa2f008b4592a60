"""A running Slurm, and the job scripts of scripts/slurm/ submitted to it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts" / "slurm"


@dataclass(frozen=True)
class Cluster:
    """A running Slurm: where it lies, and the environment that speaks to it."""

    folder: Path
    env: dict[str, str]

    def run(self, *words: object, **env: str) -> str:
        """The stdout of a command that must succeed."""
        ran = subprocess.run(
            [str(w) for w in words], env=self.env | env, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert ran.returncode == 0, f"{words}: {ran.stderr}"
        return ran.stdout

    def states(self, number: str) -> list[str]:
        """The state of a job; of each task of an array."""
        return re.findall(r"JobState=(\S+)", self.run("scontrol", "show", "job", "--oneliner", number))

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job: JobState, Reason, ExitCode, StartTime ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", number)))

    def wait(self, number: str, *states: str, seconds: float = 180) -> dict[str, str]:
        """The job, once it is in one of the states. Fails with its log after `seconds`."""
        end = time.monotonic() + seconds
        while (found := self.job(number))["JobState"] not in states:
            if time.monotonic() > end or found["JobState"] in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
                log = Path(found["StdOut"])
                text = log.read_text()[-4000:] if log.exists() else "no log"
                pytest.fail(f"{found['JobName']} is {found['JobState']}, not {' or '.join(states)}: {text}")
            time.sleep(0.2)
        return found


def free_port() -> int:
    """The first of two neighbouring ports that nobody listens on."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            try:
                two.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def clean_environment(port: int) -> dict[str, str]:
    """This environment without what another Slurm or sbatch put there."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    return env | {
        "MDLTOOL_SLURM_PORT": str(port),
        "MDLTOOL_SLURM_REQUEUE_WAIT": "8",
        "MDLTOOL_HOME": str(ROOT),
        "MDLTOOL_CPUS": "1",
        "MDLTOOL_WORKERS": "0",
        "OMP_NUM_THREADS": "1",
    }


def local_cluster(verb: str, folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    words = [str(SCRIPTS / "local_cluster"), verb, str(folder)]
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)


def wait_for_text(path: Path, text: str, count: int = 1) -> None:
    end = time.monotonic() + 60
    while not path.exists() or path.read_text().count(text) < count:
        assert time.monotonic() < end, f"no {text!r} in {path.read_text() if path.exists() else path}"
        time.sleep(0.1)


def submit_chain(
    work: Path, env: Mapping[str, str], sets: Sequence[str], *words: object
) -> subprocess.CompletedProcess[str]:
    """pipeline.sh with these words and settings of the training."""
    settings = [word for key in sets for word in ("--set", key)]
    return subprocess.run(
        [str(SCRIPTS / "pipeline.sh"), *map(str, words), "--", *settings],
        env={**env, "MDLTOOL_WORK": str(work)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def submitted(ran: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """stage -> job number"""
    assert ran.returncode == 0, ran.stderr
    return {stage: job for job, stage in (line.split() for line in ran.stdout.splitlines())}
