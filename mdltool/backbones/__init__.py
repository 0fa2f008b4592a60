"""Backbones: a library's own network, its input specification and its sites. One thin file per backbone."""

from mdltool.registry import Table

BACKBONES = Table(
    "backbone",
    {
        "x3d_m": "mdltool.backbones.x3d:X3DM",
        "x3d_tiny": "mdltool.backbones.x3d:X3DTiny",
        "slow_r50": "mdltool.backbones.slow_r50:SlowR50",
    },
)
