"""mdltool doctor."""

from __future__ import annotations

import typer

from mdltool.cli import options


def register(app: typer.Typer) -> None:
    app.command("doctor", epilog="Example: mdltool doctor --json")(doctor)


def doctor(work: options.Work = None, as_json: options.Json = False) -> None:
    """What this machine can do: torch, devices, decoders, Slurm, memory, disk, optional packages."""
    from mdltool import console
    from mdltool.artifact import work_dir
    from mdltool.stages import doctor as stage

    found = stage.run(work_dir(work))
    if as_json:
        console.result_json(found)
        return
    torch, devices, disk = found["torch"], found["devices"], found["disk"]
    rows = [
        ("python", f"{found['python']['version']} ({found['python']['executable']})"),
        ("torch", f"{torch['version']}, torchvision {torch['torchvision']}, {torch['threads']} threads"),
        ("cpu", f"{devices['cpu']}, {devices['cores']} cores, bf16: {', '.join(devices['bf16']) or 'no'}"),
        ("gpu", ", ".join(devices["gpus"]) or "none"),
        *((f"decoder {name}", fault or "works") for name, fault in found["decoders"].items()),
        ("slurm", ", ".join(name for name, path in found["slurm"].items() if path) or "not here"),
        ("memory", f"{found['memory_gb']} GB"),
        ("disk", f"{disk['free_gb']} GB free of {disk['total_gb']} at {disk['work']}"),
        *((f"extra {name}", install or "here") for name, install in found["extras"].items()),
    ]
    if "fault" in torch:
        rows.insert(2, ("", torch["fault"]))
    console.table("", ("what", "found"), rows, to_stdout=True)
