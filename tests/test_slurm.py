"""The job scripts of scripts/slurm/, run by a real Slurm of one node that local_cluster starts."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mdltool.artifact import open_artifact
from tests import epic_videos
from tests.conftest import TINY, Ran, World
from tests.slurm import (
    ROOT,
    SCRIPTS,
    Cluster,
    clean_environment,
    free_port,
    local_cluster,
    submit_chain,
    submitted,
    wait_for_text,
)

DAEMONS = ("munged", "slurmctld", "slurmd")
UPDATES = 30


def pid_of(folder: Path, daemon: str) -> int | None:
    """The process that a daemon's pid file names, where it is alive."""
    try:
        pid = int((folder / f"{daemon}.pid").read_text())
        return pid if Path(f"/proc/{pid}/comm").read_text().strip() == daemon else None
    except (OSError, ValueError):
        return None


@pytest.fixture(scope="module")
def slurm() -> None:
    """Skips where Slurm is not installed; fails there under MDLTOOL_REQUIRE_SLURM."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [name for name in (*DAEMONS, "sbatch") if shutil.which(name, path=path) is None]
    if missing:
        message = f"Slurm is not installed ({', '.join(missing)}): apt-get install slurm-wlm munge"
        pytest.fail(message) if os.environ.get("MDLTOOL_REQUIRE_SLURM") else pytest.skip(message)


@pytest.fixture(scope="module")
def cluster(slurm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    env = clean_environment(free_port())
    started = local_cluster("start", folder, env)
    assert started.returncode == 0, started.stderr
    try:
        yield Cluster(folder, env | {"SLURM_CONF": str(folder / "slurm.conf")})
    finally:
        stopped = local_cluster("stop", folder, env)
        assert stopped.returncode == 0, stopped.stderr


def test_cluster_starts_and_stops_any_number_of_times(slurm: None, tmp_path: Path) -> None:
    env = clean_environment(free_port())
    try:
        for _ in range(2):
            for _ in range(2):
                started = local_cluster("start", tmp_path, env)
                assert started.returncode == 0, started.stderr
                assert started.stdout == f"export SLURM_CONF={tmp_path / 'slurm.conf'}\n"
            assert all(pid_of(tmp_path, daemon) for daemon in DAEMONS)
            for _ in range(2):
                assert local_cluster("stop", tmp_path, env).returncode == 0
            assert not any(pid_of(tmp_path, daemon) for daemon in DAEMONS)
    finally:
        local_cluster("stop", tmp_path, env)


def test_a_taken_port_is_one_message(slurm: None, tmp_path: Path) -> None:
    port = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port + 1))
        taken.listen()
        ran = local_cluster("start", tmp_path, clean_environment(port))
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert ran.stderr.startswith(f"error: port {port + 1} is taken\n")
    assert not any(pid_of(tmp_path, daemon) for daemon in DAEMONS)


def test_a_missing_package_is_one_message(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "mkdir", "dirname", "cat", "env"):
        (tools / name).symlink_to(str(shutil.which(name)))
    for name in ("munged", "slurmctld", "sbatch", "srun"):
        (tools / name).symlink_to("/bin/true")
    # /usr/sbin may hold the real ones; a function cannot hide them, so the script's own PATH line is taken out
    script = (SCRIPTS / "local_cluster").read_text().replace('export PATH="$PATH:/usr/sbin:/sbin"', "export PATH")
    (tmp_path / "local_cluster").write_text(script)
    ran = subprocess.run(
        [str(tools / "bash"), str(tmp_path / "local_cluster"), "start", str(tmp_path / "cluster")],
        env={"PATH": str(tools), "MDLTOOL_SLURM_PORT": str(free_port())},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert ran.returncode == 1
    assert "there is no slurmd" in ran.stderr
    assert "apt-get install slurm-wlm munge" in ran.stderr


# A stand-in for mdltool: it makes the partial directory, waits for a signal and answers it as mdltool does.
WAITS = """#!/usr/bin/env bash
trap 'exit 75' TERM USR1
while [ "$1" != --out ]; do shift; done
mkdir -p "$2.partial" && touch "$2.partial/partial.json"
echo "started ${*:3} rank $RANK of $WORLD_SIZE at $MASTER_ADDR"
for ((i = 0; i < 600; i++)); do sleep 0.1; done
exit 1
"""
FAILS = """#!/usr/bin/env bash
exit 1
"""


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path) -> Callable[..., str]:
    """`submit(program, *sbatch_options)` -> the number of a train.sh job that runs this program as mdltool."""

    def submit_program(program: str, *options: str, **env: str) -> str:
        tools = tmp_path / ".venv" / "bin"
        tools.mkdir(parents=True, exist_ok=True)
        (tools / "mdltool").write_text(program)
        (tools / "mdltool").chmod(0o755)
        if not (tmp_path / "scripts").exists():
            (tmp_path / "scripts").symlink_to(ROOT / "scripts")
        words = ("--parsable", "--cpus-per-task=1", f"--output={tmp_path}/%j.log", *options)
        script = (SCRIPTS / "train.sh", tmp_path / "model")
        return cluster.run("sbatch", *words, *script, MDLTOOL_HOME=str(tmp_path), **env).strip()

    return submit_program


def test_every_task_is_a_rank_and_a_stopped_job_resumes_so_often(
    cluster: Cluster, submit: Callable[..., str], tmp_path: Path
) -> None:
    job = submit(WAITS, "--ntasks=2", MDLTOOL_MAX_RESTARTS="1")
    log = tmp_path / f"{job}.log"
    wait_for_text(log, "started", 2)
    assert set(re.findall(r"rank \d of \d at \S+", log.read_text())) == {
        "rank 0 of 2 at localhost",
        "rank 1 of 2 at localhost",
    }
    assert "--resume" not in log.read_text()
    cluster.run("scancel", "--signal=USR1", job)
    wait_for_text(log, "started", 4)
    assert log.read_text().count("--resume") == 2, "the second start of both ranks resumes"
    cluster.run("scancel", "--signal=USR1", job)
    wait_for_text(log, "not again (MDLTOOL_MAX_RESTARTS)")
    assert cluster.wait(job, "FAILED", seconds=30)["ExitCode"] == "75:0"


def test_a_job_requeued_from_outside_resumes(cluster: Cluster, submit: Callable[..., str], tmp_path: Path) -> None:
    job = submit(WAITS)
    log = tmp_path / f"{job}.log"
    wait_for_text(log, "started")
    cluster.run("scontrol", "requeue", job)
    wait_for_text(log, "started", 2)
    assert log.read_text().count("--resume") == 1
    assert cluster.job(job)["Restarts"] == "1"
    cluster.run("scancel", job)


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, submit: Callable[..., str], tmp_path: Path) -> None:
    job = submit(WAITS)
    wait_for_text(tmp_path / f"{job}.log", "started")
    cluster.run("scancel", job)
    assert cluster.wait(job, "CANCELLED", seconds=30)["Restarts"] == "0"
    end = time.monotonic() + 30
    while cluster.run("squeue", "--noheader", "--jobs", job, "--states=all", "--format=%t").strip() == "CG":
        assert time.monotonic() < end
        time.sleep(0.2)
    assert cluster.job(job)["JobState"] == "CANCELLED"
    assert "requeueing" not in (tmp_path / f"{job}.log").read_text()


def test_after_a_failure_nothing_is_requeued_and_dependents_go(
    cluster: Cluster, submit: Callable[..., str]
) -> None:
    job = submit(FAILS)
    after = submit(FAILS, f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes")
    assert cluster.wait(after, "CANCELLED", seconds=60)["Reason"] == "DependencyNeverSatisfied"
    failed = cluster.job(job)
    assert (failed["JobState"], failed["Restarts"], failed["ExitCode"]) == ("FAILED", "0", "1:0")


def pipeline(work: Path, env: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    """pipeline.sh for the two tiny domains."""
    more = (f"train.steps.0.updates={UPDATES}", "train.checkpoint_every=1000", "val.every=1000", "data.batch=2")
    return submit_chain(work, env, (*TINY, *more), *words)


def test_pipeline_without_its_inputs_submits_nothing(world: World, tmp_path: Path) -> None:
    calls = tmp_path / "sbatch"
    calls.write_text(f"#!/usr/bin/env bash\ntouch {tmp_path}/called\necho 1\n")
    calls.chmod(0o755)
    env = clean_environment(1)
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    recipe = world.work / "two.yaml"
    source = f"neon-train={world.videos}/neon/train --format folder"
    for words, message in (
        ((recipe, source), "there are no shards of chalk-train"),
        ((recipe, source, source.replace("neon", "chalk")), "and there is none"),
        (("tiny_dmo",), "tiny_demo"),
        ((recipe, "neon"), "is no DOMAIN-SPLIT"),
    ):
        ran = pipeline(tmp_path / "artifacts", env, *words)
        assert ran.returncode == 1, words
        assert message in ran.stderr
        assert ran.stdout == ""
    assert not (tmp_path / "called").exists()


def test_pipeline_compresses_and_adds_a_modality_where_it_is_told_to(world: World, tmp_path: Path) -> None:
    """By what it hands to sbatch."""
    calls = tmp_path / "sbatch"
    calls.write_text(f'#!/usr/bin/env bash\necho "$@" >> {tmp_path}/called\nwc -l < {tmp_path}/called\n')
    calls.chmod(0o755)
    further = {"MDLTOOL_COMPRESS": "--rank 0.5 --finetune 7", "MDLTOOL_MODALITY": "--modality audio"}
    env = clean_environment(1) | further
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    work = tmp_path / "artifacts"
    work.mkdir()
    (work / "shards").symlink_to(world.work / "shards")
    words = (world.work / "two.yaml", "--", "--set", "backbone.weights=scratch")
    jobs = submitted(pipeline(work, env, *words))
    made = ["train", "eval", "compress", "eval-compressed", "add-modality", "eval-extended", "report"]
    assert list(jobs) == made
    lines = (tmp_path / "called").read_text().splitlines()
    model = work / "model" / "two"
    assert lines[2].endswith(f"further.sh {model}-compressed compress {model} --rank 0.5 --finetune 7")
    of_compressed = f"{model}-compressed-extended add-modality {model}-compressed --modality audio"
    assert lines[4].endswith(f"further.sh {of_compressed}")
    after = [re.findall(r"--dependency=afterok:(\S+)", line) for line in lines]
    assert after == [[], ["1"], ["1"], ["3"], ["3"], ["5"], ["2:4:6"]]
    evals = [str(work / "eval" / f"two{suffix}") for suffix in ("", "-compressed", "-compressed-extended")]
    assert " ".join(evals) in lines[6]


def last_step(work: Path) -> int:
    """Updates done by the training that runs in `work`, by its log."""
    path = work / "model" / "two.partial" / "metrics.jsonl"
    try:
        return max((int(n) for n in re.findall(r'"step": (\d+),', path.read_text())), default=0)
    except OSError:
        return 0


def interrupt(cluster: Cluster, job: str, work: Path, after: int, *command: str) -> None:
    """Run a command once the training has made an update beyond `after`; it must come before the last one."""
    end = time.monotonic() + 120
    while last_step(work) <= after:
        assert time.monotonic() < end, f"no update after {after} in 120 s"
        time.sleep(0.05)
    cluster.run(*command, job)
    cluster.wait(job, "PENDING", seconds=60)


SIGNAL = ("scancel", "--signal=USR1")  # what --signal sends before the time limit, to the same processes
REQUEUE = ("scontrol", "requeue")  # from outside: SIGTERM, and SIGKILL after a while


@pytest.mark.parametrize(
    "stops", [(SIGNAL,), pytest.param((REQUEUE, SIGNAL), marks=pytest.mark.full)], ids=["signal", "requeue-signal"]
)
def test_preempted_pipeline_ends_in_the_digest_of_the_undisturbed_one(
    stops: tuple[tuple[str, str], ...], cluster: Cluster, world: World, tmp_path: Path
) -> None:
    """Training and eval on two tasks."""
    calm, stopped = tmp_path / "calm", tmp_path / "stopped"
    env = cluster.env | {"MDLTOOL_TASKS": "2", "MDLTOOL_EVAL": "--views 1x1"}
    small = " ".join(f"--set {key.replace(' ', '')}" for key in (*TINY, "train.steps.0.updates=1"))
    pretrain = {"MDLTOOL_PRETRAIN": "chalk", "MDLTOOL_PRETRAIN_OPTIONS": small}
    recipe = world.work / "two.yaml"
    calm.mkdir()
    (calm / "shards").symlink_to(world.work / "shards")
    first = submitted(pipeline(calm, env | pretrain, recipe))
    cluster.run("scancel", first["report"])  # of no use here
    cluster.wait(first["pretrain"], "COMPLETED")
    stopped.mkdir()
    for folder in ("shards", "backbone"):
        (stopped / folder).symlink_to(calm / folder)
    second = submitted(pipeline(stopped, env, recipe))
    assert list(second) == ["train", "eval", "report"]
    cluster.run("scancel", second["report"])
    log = stopped / "slurm" / f"train-{second['train']}.log"

    done = [0]
    for command in stops:
        cluster.wait(second["train"], "RUNNING")
        interrupt(cluster, second["train"], stopped, done[-1], *command)
        waiting = cluster.job(second["eval"])
        assert (waiting["JobState"], waiting["Reason"]) == ("PENDING", "Dependency"), "a requeued job is not done"
        wait_for_text(log, "resuming after update", log.read_text().count("resuming after update") + 1)
        done.append(int(re.findall(r"resuming after update (\d+)", log.read_text())[-1]))
        assert done[-2] < done[-1] < UPDATES

    for jobs in (first, second):
        cluster.wait(jobs["eval"], "COMPLETED")
        train, scored = cluster.job(jobs["train"]), cluster.job(jobs["eval"])
        assert train["EndTime"] <= scored["StartTime"]
    assert cluster.job(first["train"])["Restarts"] == "0"
    assert cluster.job(second["train"])["Restarts"] == str(len(stops))
    text = log.read_text()
    begun = {int(n) for n in re.findall(r"resuming after update (\d+)", text)}
    assert begun == set(done[1:]), "every rank goes on from one checkpoint"
    left = [int(n) for n in re.findall(r"stopped by a signal after update (\d+)", text)]
    assert left[-1] == done[-1]
    assert set(left) <= begun, "every rank stops after the same update"
    assert "defect" not in text

    digests = [json.loads((w / "model" / "two" / "artifact.json").read_text())["digest"] for w in (calm, stopped)]
    assert digests[0] == digests[1]
    for work in (calm, stopped):
        metrics = json.loads((work / "eval" / "two" / "metrics.json").read_text())
        assert metrics["model_digest"] == digests[0]
        assert [d["clips"]["evaluated"] for d in metrics["domains"].values()] == [8, 8]


@pytest.fixture
def kitchen(test_data: Path, tmp_path: Path) -> dict[str, epic_videos.Rows]:
    """The real rows of `train` and `val` of a few EPIC-Kitchens videos, in tmp_path/lists and tmp_path/videos."""
    pytest.importorskip("cv2", reason="the extra 'flow' (OpenCV) is not installed")
    return epic_videos.write_kitchen(tmp_path, test_data / "annotations" / "epic_kitchens_100")


def test_epic_kitchens_from_its_rows_to_a_compressed_model_that_hears(
    cluster: Cluster, kitchen: dict[str, epic_videos.Rows], mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    """Training shards by an array, train with flow, compress, add sound; 10x3 views of each model, and a report."""
    work = tmp_path / "artifacts"
    how = f"{tmp_path / 'videos'} --format epic_kitchens --annotations {tmp_path / 'lists'}"
    how += " --modality flow --set flow.method=dis --modality audio"
    ran = mdltool("shard", *how.split(), "--domain", "ek100", "--split", "val", "--work", work)
    assert ran.code == 0, ran.err
    later = "--set train.steps.0.epochs=1 --set train.steps.0.schedule.warmup=0"
    chain = {
        "MDLTOOL_NAME": "ek100",
        "MDLTOOL_PARTS": "2",
        "MDLTOOL_EVAL": "--views 10x3",
        "MDLTOOL_COMPRESS": "--rank 0.5",
        "MDLTOOL_MODALITY": f"--modality audio {later}",
    }
    sets = (*epic_videos.SMALL, "domains.ek100.streams=[flow]")
    source = f"ek100-train={how} --shard-size 200KB"
    jobs = submitted(submit_chain(work, cluster.env | chain, sets, "cm3t_ek100", source))
    further = ("compress", "eval-compressed", "add-modality", "eval-extended")
    assert list(jobs) == ["shard-ek100-train", "merge-ek100-train", "train", "eval", *further, "report"]
    for job in jobs.values():
        cluster.wait(job, "COMPLETED")
    for stage, job in jobs.items():
        assert cluster.states(job) == ["COMPLETED"] * (2 if stage.startswith("shard") else 1)

    for split, rows in kitchen.items():
        shards = open_artifact(work / "shards" / f"ek100-{split}", "shards").load_json("index.json")
        keys = {member["key"] for shard in shards["shards"] for member in shard["members"]}
        assert keys == {row["narration_id"] for row in rows}
        assert {name: info["clips"] for name, info in shards["streams"].items()} == dict.fromkeys(
            ("flow", "audio"), len(rows)
        )
        assert len(shards["shards"]) >= (2 if split == "train" else 1), "each task of the array had some"
    before = {open_artifact(work / "shards" / f"ek100-{split}").digest for split in kitchen}
    scored = set()
    for name, heard in (("", ["flow"]), ("-compressed", ["flow"]), ("-compressed-extended", ["flow", "audio"])):
        model = open_artifact(work / "model" / f"ek100{name}", "model")
        assert model.verify() == []
        assert before <= {entry.digest for entry in model.inputs}
        evaluated = open_artifact(work / "eval" / f"ek100{name}", "eval")
        assert model.digest in {entry.digest for entry in evaluated.inputs}
        metrics = evaluated.load_json("metrics.json")
        domain = metrics["domains"]["ek100"]
        assert (metrics["model_digest"], metrics["views"]) == (model.digest, "10x3")
        assert domain["clips"]["evaluated"] == len(kitchen["val"])
        assert list(domain["streams"]) == heard
        assert {"verb_top1", "noun_top1", "action_top1"} <= domain["metrics"].keys()
        before = {model.digest}
        scored.add(evaluated.digest)
    report = open_artifact(work / "report" / "ek100", "report")
    assert scored == {entry.digest for entry in report.inputs}
    assert report.file("report.html").is_file()
