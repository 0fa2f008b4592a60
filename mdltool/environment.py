"""What made an artifact."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any


def environment() -> dict[str, Any]:
    """Versions and host; not part of an artifact's digest."""
    versions = {}
    for package in ("torch", "torchvision", "av", "torchcodec", "pytorchvideo", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "packages": versions,
    }
