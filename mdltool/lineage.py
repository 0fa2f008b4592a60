"""An artifact and what it was made from, back to the shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mdltool.artifact import Artifact, Input, open_artifact
from mdltool.errors import MdlError
from mdltool.remote import Url, location


@dataclass
class Node:
    """One artifact of a lineage.

    artifact: None where it is gone, or lies elsewhere and was not asked for. faults: what is wrong with it. unread:
    its files that were not verified.
    """

    path: Path | Url
    kind: str
    digest: str
    role: str = ""
    artifact: Artifact | None = None
    faults: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    inputs: list[Node] = field(default_factory=list)

    def walk(self) -> Iterator[Node]:
        """This node and all below, each once per place where it stands."""
        return (node for node, _ in self.indented())

    def indented(self, depth: int = 0) -> Iterator[tuple[Node, int]]:
        """Nodes with their depth, parents before children."""
        yield self, depth
        for node in self.inputs:
            yield from node.indented(depth + 1)


def trace(path: Path | Url, verify: bool = False) -> Node:
    """The lineage of the artifact at `path`; verify checks every file's hash, each artifact once.

    Inputs that lie elsewhere are looked at by verify alone, which leaves their tar files unread. Raises MdlError
    when `path` itself is no artifact; what is wrong further back becomes faults of the nodes.
    """
    root = open_artifact(path)
    return _node(Node(path, root.kind, root.digest, artifact=root), verify, {})


def _node(node: Node, verify: bool, verified: dict[str, list[str]]) -> Node:
    artifact = node.artifact
    assert artifact is not None
    if verify:
        key = str(artifact.path.resolve())
        if isinstance(node.path, Url) and node.role:  # an input: its videos may be more than one wants to fetch
            node.unread = [name for name in artifact.files if name.endswith(".tar")]
        if key not in verified:
            verified[key] = artifact.verify(name for name in artifact.files if name not in node.unread)
        node.faults += verified[key]
    node.inputs = [_input(entry, verify, verified) for entry in artifact.inputs]
    return node


def _input(entry: Input, verify: bool, verified: dict[str, list[str]]) -> Node:
    node = Node(location(entry.path), entry.kind, entry.digest, entry.role)
    if isinstance(node.path, Url) and not verify:
        return node
    try:
        node.artifact = open_artifact(node.path)
    except MdlError as error:
        node.faults.append(f"not here any more ({error.what})")
        return node
    if node.artifact.digest != entry.digest:
        node.faults.append(f"another artifact lies there now (digest {node.artifact.digest[:12]})")
        return node
    return _node(node, verify, verified)
