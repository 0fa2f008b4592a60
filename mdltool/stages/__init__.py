"""The stages: one file each, run(...) -> Artifact. They import neither each other nor the cli."""
