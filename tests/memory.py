"""Memory that a test fills before a library reads what it never wrote."""

from __future__ import annotations

import torch

SIZES = [16 * 4**power for power in range(8)]  # floats: 64 bytes to 1 MB


def soil() -> None:
    """Leave not-a-numbers in what the allocator hands out next."""
    blocks = [torch.full((size,), float("nan")) for size in SIZES for _ in range(40)]
    del blocks
