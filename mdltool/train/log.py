"""metrics.jsonl, cut back on resume so that no update stands in it twice, and the trackers beside it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mdltool import console


class MetricsLog:
    """One JSON object a line. Lines after `resume_at` updates, and a torn last line, are dropped first."""

    def __init__(self, path: Path, resume_at: int, accelerator: Accelerator | None = None) -> None:
        self.accelerator = accelerator
        kept = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                if json.loads(line)["step"] <= resume_at:
                    kept.append(line)
            except (ValueError, KeyError):
                continue
        path.write_text("".join(line + "\n" for line in kept))
        self.handle = open(path, "a", buffering=1)  # noqa: SIM115 - closed by close()

    def write(self, step: int, domain: str | None = None, **values: Any) -> None:
        """Log values of an update, of one domain where given."""
        head = {"step": step} | ({"domain": domain} if domain else {})
        self.handle.write(json.dumps(head | values) + "\n")
        if self.accelerator is not None:
            numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
            self.accelerator.log({f"{domain}/{k}" if domain else k: v for k, v in numbers.items()}, step=step)

    def close(self) -> None:
        self.handle.close()
        if self.accelerator is not None:
            # not end_training(), which leaves the process group as well: rank 0 still has to say that it is done
            for tracker in self.accelerator.trackers:
                tracker.finish()


def make_accelerator(precision: str, tracking: Path) -> Accelerator:
    """Accelerate's device, autocast and trackers. TensorBoard where it is installed, else it is said once."""
    from accelerate.state import AcceleratorState

    # The state is one per process and would refuse a second run with another precision.
    AcceleratorState._reset_state(reset_partial_state=False)
    have = importlib.util.find_spec("tensorboard") is not None
    if not have:
        console.say(
            "TensorBoard is not installed, so metrics.jsonl is the only log (pip install mdltool[tensorboard])"
        )
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        log_with="tensorboard" if have else None,
        project_dir=str(tracking) if have else None,
    )
    if have:
        accelerator.init_trackers("tensorboard")
    return accelerator
