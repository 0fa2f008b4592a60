"""Losses beside a task's own: what multi-dataset training adds. One file per loss."""

from mdltool.registry import Table

LOSSES = Table(
    "loss",
    {
        "informative": "mdltool.losses.informative:informative_loss",
        "projected": "mdltool.losses.projection:projected_loss",
        "multitrain": "mdltool.losses.multitrain:MultitrainLoss",
    },
)

WEIGHTINGS = Table(
    "weighting of losses",
    {
        "uncertainty": "mdltool.losses.weighting:UncertaintyWeights",
        "fixed": "mdltool.losses.weighting:FixedWeights",
    },
)
