"""Two processes train; the second meets a clip whose frames are not finite: `python -m ... nan FOLDER`.

Before, both have passed over a clip of a, and the second one of b.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator

from mdltool.errors import Elsewhere, MdlError
from mdltool.tasks import SingleLabel
from mdltool.train.distributed import join_world
from mdltool.train.loop import Trainer
from mdltool.train.objective import TaskObjective
from mdltool.train.optim import OptimizerSpec, ScheduleSpec
from mdltool.train.plan import RunParts, StepSpec, TrainSpec
from mdltool.types import Batch
from tests.models import clips, tiny_model


def main() -> int:
    torch.set_num_threads(1)
    world = join_world()

    def batches(_: int) -> Iterator[Batch]:
        for position in range(0, 40, 4):
            for number, domain in enumerate("ab"):
                frames = clips(2, seed=position)
                if domain == "b" and world.rank == 1 and position == 4:
                    frames[1] = float("nan")
                keys = [f"{domain}/{position + 2 * world.rank + k}" for k in range(2)]
                batch = Batch(domain, frames, torch.tensor([0, 1]), keys, whole={domain: 4}, number=number)
                if position == 0 and (domain == "a" or world.rank == 1):
                    batch.skipped.append((f"{domain}/40", "damaged"))
                yield batch

    step = StepSpec("joint", 10, OptimizerSpec("sgd", 0.01), ScheduleSpec())
    spec = TrainSpec((step,), ("a", "b"), 2, "frozen")
    parts = RunParts(batches, None, lambda model: model.tensors(), Accelerator(cpu=True), 2, world)
    objective = TaskObjective(dict.fromkeys("ab", SingleLabel()))
    try:
        Trainer(tiny_model(adapter=None), spec, objective, Path(sys.argv[2]), parts).run()
    except Elsewhere:
        return 1
    except MdlError as error:
        sys.stderr.write(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
