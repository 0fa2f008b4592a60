"""What a user installs: the wheel has the recipes, and finds them without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from mdltool.recipe import shipped

ROOT = Path(__file__).parent.parent


def test_the_wheel_brings_the_recipes(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import mdltool; from mdltool.recipe import load, shipped;"
        "load('tiny_demo'); print(mdltool.__file__, *shipped(), sep='\\n')"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    where, *recipes = ran.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path)
    assert recipes == list(shipped())
