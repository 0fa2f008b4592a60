"""Fixtures for the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real clips and annotation files; tests that need it skip visibly where it is not set."""
    folder = os.environ.get("MDLTOOL_TEST_DATA")
    if not folder:
        pytest.skip("MDLTOOL_TEST_DATA is not set: the real clips are not here")
    path = Path(folder)
    assert (path / "MANIFEST.csv").is_file(), f"MDLTOOL_TEST_DATA={folder} holds no MANIFEST.csv"
    return path
