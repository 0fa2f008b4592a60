"""mdltool inspect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdltool.cli import options
from mdltool.cli.compress import show
from mdltool.errors import MdlError

if TYPE_CHECKING:
    from mdltool.lineage import Node


def register(app: typer.Typer) -> None:
    app.command("inspect", epilog="Example: mdltool inspect artifacts/model/tiny_demo --verify")(inspect)


def inspect(
    path: Annotated[str, typer.Argument(help="An artifact directory, or its address.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every hash of it and of what it was made from.")
    ] = False,
    projections: Annotated[
        bool, typer.Option("--projections", help="Which classes a model's projections connect most.")
    ] = False,
    topk: Annotated[int, typer.Option("--topk", min=1, help="Class pairs of each pair of domains.")] = 5,
    as_json: options.Json = False,
) -> None:
    """What an artifact is and what it was made from, back to the shards. Exit code 1 where something is wrong."""
    from mdltool import console
    from mdltool.lineage import trace
    from mdltool.remote import location

    if projections:
        _projections(path, topk, as_json)
        return
    root = trace(location(path), verify)
    if as_json:
        console.result_json(_json(root))
    else:
        _print(root)
    faults = [f"{node.path}: {fault}" for node in root.walk() for fault in node.faults]
    if faults:
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise MdlError("; ".join(faults[:5]) + more, path, "make the damaged or missing artifact again")
    if verify:
        unread = sorted({str(node.path) for node in root.walk() if node.unread})
        for path in unread:
            console.say(f"{path}: its shards were not read (mdltool inspect {path} --verify reads them)")
        console.say("every other hash is right" if unread else "every hash is right")


def _projections(path: str, topk: int, as_json: bool) -> None:
    from mdltool import console
    from mdltool.artifact import open_artifact
    from mdltool.stages import projections as stage

    found = stage.run(open_artifact(path, "model"), topk)
    if as_json:
        console.result_json(found)
        return
    for entry in found:
        rows = [(p["source_class"], p["target_class"], f"{p['weight']:.4f}") for p in entry["pairs"]]
        title = f"{entry['source']} to {entry['target']}"
        console.table(title, (entry["source"], entry["target"], "weight"), rows, to_stdout=True)


def _json(node: Node) -> dict[str, Any]:
    found: dict[str, Any] = {
        "role": node.role,
        "path": str(node.path),
        "kind": node.kind,
        "digest": node.digest,
        "faults": node.faults,
        "unread": node.unread,
    }
    if node.artifact is not None:
        manifest = node.artifact.manifest
        found |= {
            key: manifest[key] for key in ("stage", "name", "created", "mdltool", "summary", "files", "environment")
        }
    return found | {"inputs": [_json(child) for child in node.inputs]}


def _print(root: Node) -> None:
    from mdltool import console

    artifact = root.artifact
    assert artifact is not None, "trace raises for a root that cannot be opened"
    size = sum(entry["bytes"] for entry in artifact.files.values())
    console.result(
        f"{artifact.path}: {artifact.kind}, made by '{artifact.stage}' on {artifact.manifest['created']}"
    )
    console.result(f"digest  {artifact.digest}")
    console.result(f"files   {len(artifact.files)}, {size / 1e6:.1f} MB")
    for key, value in artifact.summary.items():
        console.result(f"{key:<16}  {_short(value)}")
    console.result("lineage")
    for node, depth in root.indented():
        state = "" if not node.faults else f"  !! {'; '.join(node.faults)}"
        role = f"{node.role}: " if node.role else ""
        console.result(f"  {'  ' * depth}{role}{node.kind} {node.digest[:12]}  {node.path}{state}")
    if "compression.json" in artifact.files:
        show(artifact, to_stdout=True)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(inner)}" for key, inner in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
