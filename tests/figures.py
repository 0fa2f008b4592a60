"""Printed figures beside ours: which have a remark, and which one."""

from __future__ import annotations

from typing import Any

from mdltool.recipe import load


def check_remarks(name: str, found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every figure that the recipe's paper prints otherwise than we count it has a remark, which says what it must
    be or the recipe's reason, and no other figure has; no reason is left that nothing needs.

    found: what describe.published says. Returns the figures.
    """
    source = load(name).published
    assert source is not None
    assert set(found["parameters"]) == set(source.parameters_m)
    assert set(found["percent"]) == set(source.percent)
    assert {"gflops", "size"} & found.keys() == {key for key in ("gflops", "size") if getattr(source, key)}
    figures: dict[str, dict[str, Any]] = found["percent"] | found["parameters"]
    figures |= {key: found[key] for key in ("size", "gflops") if key in found}
    unexplained = set()
    for key, entry in figures.items():
        in_millions = key in source.parameters_m
        printed, ours = (
            (entry["printed_m"], entry["ours"] / 1e6) if in_millions else (entry["printed"], entry["ours"])
        )
        digits = source.digits if in_millions else len(f"{printed:g}".partition(".")[2])
        digits = 1 if key in source.percent else digits
        remark = entry["remark"]
        if key in source.corrected:
            assert remark.startswith(f"the paper's cell is wrong: {source.corrected[key]:g}"), (name, key, remark)
        elif abs(ours - printed) * 10**digits <= 0.5:
            assert (entry["matches"], remark) == (True, ""), (name, key, entry)
        else:
            assert not entry["matches"], (name, key, entry)
        if not entry["matches"]:
            unexplained.add(key)
            assert remark.endswith(source.why[key]), (name, key, remark)
    assert unexplained == set(source.why), name
    return figures
