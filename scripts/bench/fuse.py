"""A forward of a fused model beside the bare backbone's with a head, and the adapted model's.

    python scripts/bench/fuse.py [--check] [--repetitions 15] [--threads 2] [NETWORK ...]

Networks: resnet26 (32 pictures of 64 pixels), x3d_m (one clip of 16 frames, 224 pixels), slow_r50 (one of 8); by
default the first two. Adapters are parallel ones at all sites, weights random, float32 on the CPU, channels last as
in `eval`. The three models take turns, in another order every time. --check exits with 1 when the median over the
turns of fused / bare is above 1.02 for one of the networks.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import statistics
import sys
import time

import torch

from mdltool.backbones import BACKBONES
from mdltool.compress.fusing import fused
from mdltool.model import MultiDomainModel, build_model
from mdltool.model_spec import AdapterSpec, ModelSpec

REACH = 1.02
BATCH = {"resnet26": 32, "x3d_m": 1, "slow_r50": 1}
FORMS = ("bare", "fused", "adapted")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=", ".join(BATCH))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{options.threads} thread(s), load of the last 1, 5 and 15 minutes: {load}")
    worst = max(compare(name, options.repetitions) for name in options.networks or ("resnet26", "x3d_m"))
    print(f"a fused forward takes at most {worst:.3f} times the bare backbone's; the reach is {REACH:g}")
    return 1 if options.check and worst > REACH else 0


def compare(name: str, repetitions: int) -> float:
    """Print the medians of one network; returns the median over the turns of fused / bare."""
    models = models_of(name)
    spec = models["bare"].spec
    clips = torch.randn(BATCH[name], 3, spec.num_frames, spec.crop, spec.crop)
    clips = clips.contiguous(memory_format=torch.channels_last_3d)
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    with torch.inference_mode():
        for turn in range(-2, repetitions):
            for i in range(len(FORMS)):
                form = FORMS[(turn + i) % len(FORMS)]
                started = time.perf_counter()
                models[form](clips, "a")
                if turn >= 0:  # the first two warm up
                    times[form].append(time.perf_counter() - started)
    bare = statistics.median(times["bare"])
    print(f"{name}: {list(clips.shape)}")
    for form in FORMS:
        median = statistics.median(times[form])
        spread = f"{min(times[form]) * 1e3:.1f} to {max(times[form]) * 1e3:.1f}"
        print(f"  {form:8} {median * 1e3:8.2f} ms ({spread})  {median / bare:6.3f}")
    ratio = statistics.median(f / b for f, b in zip(times["fused"], times["bare"], strict=True))
    print(f"  fused / bare, turn by turn: {ratio:.3f}")
    return ratio


def models_of(name: str) -> dict[str, MultiDomainModel]:
    factory = BACKBONES.load(name)
    spec = ModelSpec(
        name,
        {},
        factory.default_frames,
        factory.default_crop,
        {"a": 100},
        [AdapterSpec("parallel", "all")],
        bn="per_domain",
    )
    torch.manual_seed(0)
    adapted = build_model(spec).eval()
    models = {
        "bare": build_model(dataclasses.replace(spec, adapters=[], bn="frozen")).eval(),
        "fused": fused(copy.deepcopy(adapted), "a"),
        "adapted": adapted,
    }
    return {form: model.channels_last() for form, model in models.items()}


if __name__ == "__main__":
    sys.exit(main())
