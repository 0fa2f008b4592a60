"""Two processes give what one gives with the same global batches (spec omi_mdl 6.1, multitrain 6.1 and 6.3)."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mdltool.train.distributed import World
from tests.processes import start
from tests.train.processes import CASES, model_of, run


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of every case."""
    folder = tmp_path_factory.mktemp("two")
    for process in start(2, "tests.train.processes", folder):
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    return folder


@functools.cache
def alone(name: str) -> dict[str, Tensor]:
    """What one process makes of a case."""
    return run(CASES[name], World())


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        scale = float(value.double().abs().max())
        torch.testing.assert_close(found[key], value, rtol=rtol, atol=rtol * scale + 1e-12, msg=key)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(name: str, two: Path) -> None:
    before, expected = model_of(CASES[name]).tensors(), alone(name)
    moved = [key for key, value in before.items() if not torch.equal(value, expected[f"model/{key}"])]
    assert len(moved) > 5, "the run changes something"
    assert_same(load_file(two / f"{name}.safetensors"), expected)


FROZEN = {  # BatchNorm sees micro-batches, so it stands still here
    "frozen, adapters without norms": CASES["frozen, adapters without norms"],
    "multitrain, adapters": CASES["multitrain, adapters"],
    "multitrain": replace(CASES["multitrain"], bn="frozen"),
    "multitrain, mixed clips": replace(CASES["multitrain, mixed clips"], bn="frozen"),
}


@pytest.mark.parametrize("name", FROZEN)
def test_accumulation_is_one_large_batch(name: str) -> None:
    whole = alone(name) if FROZEN[name] == CASES[name] else run(FROZEN[name], World())
    assert_same(run(FROZEN[name], World(), 2), whole)
    if name == "multitrain":  # spec multitrain property 13
        local = run(replace(FROZEN[name], exact=False), World(), 2)
        assert any(not torch.allclose(local[key], value, rtol=1e-4) for key, value in whole.items())
