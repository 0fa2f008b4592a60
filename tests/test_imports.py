"""Imports go one way (design, section 3)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mdltool

ROOT = Path(mdltool.__file__).parent
# A module may import from its own tier and the ones before it.
TIERS = (
    ("errors",),
    ("registry", "types", "files", "remote", "environment", "artifact", "lineage", "console"),
    ("wrapping", "convolution", "sync_norm", "recompute"),
    ("tasks", "adapters", "backbones", "losses", "heads"),
    (
        "model_spec",
        "domain_pack",
        "counting",
        "model",
        "model_store",
        "source_adapters",
        "train",
        "evaluate",
        "compress",
        "data",
        "report",
    ),
    ("schema_losses", "schema", "overrides", "published", "recipe_files", "recipe_streams", "recipe"),
    ("stages",),
    ("cli",),
)
TIER = {name: number for number, tier in enumerate(TIERS) for name in tier}
HELPERS = {
    "begin_streams",
    "modalities",
    "plan",
    "fitting",
    "making",
    "weights",
    "continuing",
    "compression",
    "sweeping",
    "whitening",
    "sources",
}  # in stages/, but no stages


def imports(path: Path) -> set[str]:
    """Dotted names under mdltool that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mdltool."):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "mdltool":
            found |= {f"mdltool.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("mdltool.")}
    return {name.removeprefix("mdltool.") for name in found}


FILES = [p for p in sorted(ROOT.rglob("*.py")) if p.parent != ROOT or p.stem not in ("__init__", "__main__")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert own in TIER, f"{own} is in no tier"
    for name in imports(path):
        package, *rest = name.split(".")
        if package == "__version__":
            continue
        assert TIER[package] <= TIER[own], f"{own} imports {name}"
        assert {own, package} != {"adapters", "backbones"}, f"{own} imports {name}"
        if own == package == "stages" and path.stem not in HELPERS:
            assert rest[0] in HELPERS, f"stage {path.stem} imports stage {rest[0]}"
        if own == "stages":
            assert package != "cli"


def test_rich_is_imported_by_the_console_alone() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert path.stem == "console" or not any(name.split(".")[0] == "rich" for name in names), path
