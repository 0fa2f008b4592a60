"""Left and right among the classes of a domain whose clips are flipped."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mdltool.errors import MdlError
from mdltool.recipe import load
from mdltool.stages.plan import check_sides


def index(*classes: str, task: str = "single_label") -> Any:
    return SimpleNamespace(domain="chalk", task=task, classes=classes)


def test_swapping_needs_classes_that_say_their_sides() -> None:
    recipe = load("tiny_demo", ["data.augment.flip=0.5", "domains.chalk.swap_sides=true"])
    check_sides(recipe, index("push left", "push right", "fold"))
    check_sides(recipe, index("turn left", "fold"))  # never flipped
    with pytest.raises(MdlError, match="no class is named with left or right"):
        check_sides(recipe, index("0", "1"))


def test_flips_that_are_not_swapped_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    flipped, still = load("tiny_demo", ["data.augment.flip=0.5"]), load("tiny_demo")
    sided = ("push left", "push right")
    check_sides(still, index(*sided))
    check_sides(flipped, index("push left", "fold"))
    check_sides(flipped, index(*sided, task="multi_label"))
    assert capsys.readouterr().err == ""
    check_sides(flipped, index(*sided))
    assert "differ by left and right alone (push left, ...)" in capsys.readouterr().err
