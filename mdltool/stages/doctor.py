"""`doctor`: what this machine can do. Gathers facts; writes no artifact."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

_EXTRAS = {
    "transformers": "transformers",
    "torchcodec": "torchcodec",
    "tensorboard": "tensorboard",
    "cv2": "flow",
    "huggingface_hub": "hub",
    "s3fs": "remote",
    "gcsfs": "remote",
}
_SLURM = ("sbatch", "srun", "scontrol")


def run(work: Path) -> dict[str, Any]:
    """Facts by subject: python, torch, devices, decoders, slurm, memory, disk of the work directory, extras."""
    from mdltool.data.decode import available_backends

    return {
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "torch": _torch(),
        "devices": _devices(),
        "decoders": available_backends(),
        "slurm": {name: shutil.which(name) for name in _SLURM},
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "disk": _disk(work),
        "extras": {
            package: None if importlib.util.find_spec(package) else f"pip install 'mdltool[{extra}]'"
            for package, extra in _EXTRAS.items()
        },
    }


def _torch() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"version": torch.__version__, "threads": torch.get_num_threads()}
    # In a process of its own: a torchvision made for another torch can take the interpreter down with it.
    probe = "import torch, torchvision; print(torchvision.__version__)"
    ran = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    if ran.returncode == 0:
        found["torchvision"] = ran.stdout.strip()
    else:
        lines = ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"]
        found["torchvision"] = None
        found["fault"] = f"torchvision does not import beside this torch: {lines[-1]}"
    return found


def _devices() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    flags = _cpu_flags()
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "bf16": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags],
        "gpus": gpus,
    }


def _cpu_name() -> str:
    return next(iter(_cpuinfo("model name")), platform.processor() or platform.machine())


def _cpu_flags() -> set[str]:
    return set(next(iter(_cpuinfo("flags")), "").split())


def _cpuinfo(key: str) -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [line.split(":", 1)[1].strip() for line in lines if line.split(":", 1)[0].strip() == key and ":" in line]


def _disk(work: Path) -> dict[str, Any]:
    place = work.resolve()
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    return {"work": str(work), "free_gb": round(usage.free / 1e9, 1), "total_gb": round(usage.total / 1e9, 1)}
