"""Serving many domains on a CPU: how long a swap takes, and what a batch of several domains costs.

    OMP_WAIT_POLICY=PASSIVE python scripts/bench/serve.py [--check] [--swaps 101] [--turns 7]
        [--clips FRAMESxCROP] [--threads N]

Random weights in the form of the recipe cm3t_ek100_swinb_mhva_pt (multi-head adapters and prefixes in every block,
3,806 classes). Swap: on swin3d_b, from one domain to another: unmount, open the other's file, which is in the page
cache, mount it, and read every page of its tensors once, because they are mapped. Mixed batch: on swin3d_t, 8 clips
of 8 domains beside 8 clips of one, in turns, at 16x112 unless --clips says otherwise (the recipe has 32x224).
Wall-clock medians; CPU time beside them, which says more on a busy machine, where threads that wait for each other
(the environment variable of the first line keeps them from spinning) make the clock's figures useless; there
--threads 1 helps. --check exits with 1 where a swap takes 20 ms or a mixed batch 1.3 times the other's time.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mdltool.domain_pack import DomainPack, model_form, read_pack
from mdltool.model import MultiDomainModel, build_model
from mdltool.model_spec import ModelSpec
from mdltool.recipe import load
from mdltool.stages.plan import model_spec, outputs_of

RECIPE = "cm3t_ek100_swinb_mhva_pt"
SWAP_MS, MIXED = 20.0, 1.3
CLIPS = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--swaps", type=int, default=101)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--clips", default="16x112")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    frames, crop = map(int, options.clips.split("x"))
    print(f"  load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    swap_ms = swap(options.swaps)
    print(f"  the reach is {SWAP_MS:g} ms")
    ratio = mixed(frames, crop, options.turns)
    print(f"  load {os.getloadavg()[0]:.1f} at the end")
    return 1 if options.check and (swap_ms >= SWAP_MS or ratio >= MIXED) else 0


def spec_of(backbone: str, **changes: object) -> ModelSpec:
    recipe = load(RECIPE)
    return dataclasses.replace(model_spec(recipe, outputs_of(recipe)), backbone=backbone, **changes)  # type: ignore


def packed(model: MultiDomainModel, domain: str) -> DomainPack:
    outputs = model.spec.domains[domain]
    own = {key: tensor for key, tensor in model.tensors(False).items() if key.startswith(f"{domain}/")}
    return DomainPack(
        domain,
        "single_label",
        tuple(map(str, range(outputs))),
        outputs,
        model_form(model.spec),
        **model.digests(),
        recipe={},
        tensors={key.removeprefix(f"{domain}/"): tensor for key, tensor in own.items()},
    )


def swap(number: int) -> float:
    """Milliseconds from one domain to another."""
    model = build_model(spec_of("swin3d_b", domains=dict.fromkeys(("a", "b"), 3806))).eval()
    with tempfile.TemporaryDirectory(prefix="mdltool-bench-") as folder:
        files = {domain: Path(folder) / f"{domain}.safetensors" for domain in ("a", "b")}
        for domain, file in files.items():
            file.write_bytes(packed(model, domain).to_bytes())
        for domain in files:
            model.unmount(domain)
        first, _ = timed(lambda: fresh_digest(model))
        model.mount("b", read_pack(files["b"]))
        found = []
        for turn in range(number):
            old, new = ("b", "a") if turn % 2 == 0 else ("a", "b")

            def change(old: str = old, new: str = new) -> None:
                model.unmount(old)
                model.mount(new, read_pack(files[new]))
                for tensor in model.tensors(with_backbone=False).values():
                    tensor.detach().numpy().reshape(-1)[::1024].sum()  # 4 bytes each: one of every page

            found.append(timed(change))
        size = files["a"].stat().st_size / 1e6
    walls, processor = sorted(wall for wall, _ in found), [cpu for _, cpu in found]
    median, late = (1e3 * walls[int(part * (number - 1))] for part in (0.5, 0.95))
    cpu = 1e3 * statistics.median(processor)
    print(f"  a swap on swin3d_b ({size:.0f} MB): {median:.1f} ms, 95% under {late:.1f} ms, CPU {cpu:.1f} ms")
    print(f"  once a loaded model, the digest of its backbone: {1e3 * first:.0f} ms")
    return median


def fresh_digest(model: MultiDomainModel) -> None:
    model._digests = None
    model.digests()


def mixed(frames: int, crop: int, turns: int) -> float:
    """The time of a batch of several domains in that of one domain's."""
    domains = [f"domain{i}" for i in range(CLIPS)]
    spec = spec_of("swin3d_t", domains=dict.fromkeys(domains, 400), num_frames=frames, crop=crop)
    model = build_model(spec).eval()
    clips = torch.randn(CLIPS, 3, frames, crop, crop)
    runs: dict[str, Callable[[], object]] = {
        "one domain": lambda: model(clips, domains[0]),
        "eight domains": lambda: model(clips, domains),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    with torch.inference_mode():
        for turn in range(turns + 1):
            for name, run in runs.items():
                took = timed(run)
                if turn:  # the first warms up
                    found[name].append(took)
    walls, processor = ({n: statistics.median(t[i] for t in took) for n, took in found.items()} for i in (0, 1))
    for name in runs:
        what = f"swin3d_t, {CLIPS} clips of {frames}x{crop}, {name}"
        print(f"  {what}: {walls[name]:.2f} s, CPU {processor[name]:.2f} s")
    ratio, cpu = (part["eight domains"] / part["one domain"] for part in (walls, processor))
    print(f"  eight domains / one domain: {ratio:.2f}, CPU {cpu:.2f}; the reach is {MIXED:g}")
    return ratio


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of this process's cores."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    sys.exit(main())
