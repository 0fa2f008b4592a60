"""The score of the Visual Decathlon (Rebuffi et al. 2017; spec residual_adapters 3.3), for any set of domains.

S = sum_d alpha_d max(0, Emax_d - E_d)^gamma: E_d is a domain's test error in percent, Emax_d twice the error of a
baseline, and alpha_d = points / Emax_d^gamma, so that no error gives the points and the baseline points / 2^gamma.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mdltool.errors import MdlError
from mdltool.registry import did_you_mean

_KEYS = ("domains", "gamma", "points")


@dataclass(frozen=True)
class Baseline:
    """What a score is measured against. accuracy: in percent, by domain. points: of a domain without error."""

    name: str
    accuracy: Mapping[str, float]
    gamma: float = 2.0
    points: float = 1000.0

    @property
    def highest(self) -> float:
        """The score without any error."""
        return self.points * len(self.accuracy)

    def max_error(self, domain: str) -> float:
        """The error in percent from which on a domain scores nothing."""
        return 2 * (100 - self.accuracy[domain])

    def points_of(self, domain: str, accuracy: float) -> float:
        """A domain's part of the score. accuracy: in percent."""
        largest = self.max_error(domain)
        return self.points * (max(0.0, largest - (100 - accuracy)) / largest) ** self.gamma


RA17 = Baseline(
    # not a row of the 2018 paper, whose own fine-tuning scores 3096: verified by the ten scores that it prints
    "the fine-tuned networks of Rebuffi et al. 2017",
    {
        "imagenet": 59.87,
        "aircraft": 60.34,
        "cifar100": 82.12,
        "dped": 92.82,
        "dtd": 55.53,
        "gtsrb": 97.53,
        "flowers": 81.41,
        "omniglot": 87.69,
        "svhn": 96.55,
        "ucf101": 51.20,
    },
)


@dataclass(frozen=True)
class Decathlon:
    """A baseline, and accuracies in percent of domains that are not measured here, such as a frozen source's."""

    baseline: Baseline = RA17
    added: Mapping[str, float] = field(default_factory=dict)

    def check(self, domains: Iterable[str], where: object) -> None:
        """Raise MdlError for a domain that the baseline has not, and for one that is both added and measured."""
        domains, known = list(domains), self.baseline.accuracy
        for domain in (*domains, *self.added):
            if domain not in known:
                fix = f"{did_you_mean(domain, known)} Or another baseline: --decathlon-baseline FILE"
                raise MdlError(f"the decathlon's baseline has no domain '{domain}'", where, fix)
        both = [domain for domain in self.added if domain in domains]
        if both:
            raise MdlError(f"{both[0]} is measured here", "--decathlon-add", "leave it out of --decathlon-add")

    def score(self, measured: Mapping[str, float]) -> dict[str, Any]:
        """The `decathlon` of metrics.json. measured: accuracies in percent, of domains that `check` passed.

        Errors and accuracies in it are in percent; `missing` are the baseline's domains that nothing is known of.
        """
        known, baseline = {**self.added, **measured}, self.baseline
        domains = {
            domain: {
                "accuracy": known[domain],
                "error": 100 - known[domain],
                "baseline_error": 100 - accuracy,
                "max_error": baseline.max_error(domain),
                "points": baseline.points_of(domain, known[domain]),
            }
            for domain, accuracy in baseline.accuracy.items()
            if domain in known
        }
        return {
            "score": sum(entry["points"] for entry in domains.values()),
            "highest": baseline.highest,
            "baseline": baseline.name,
            "gamma": baseline.gamma,
            "points": baseline.points,
            "domains": domains,
            "added": list(self.added),
            "missing": [domain for domain in baseline.accuracy if domain not in known],
        }


def headline(found: Mapping[str, Any]) -> str:
    """A score in one line, which says when it is of a part of the domains only."""
    scored, missing = len(found["domains"]), found["missing"]
    text = f"decathlon score {found['score']:.0f}"
    if missing:
        text += f" over {scored} of {scored + len(missing)} domains, of at most {scored * found['points']:.0f}: "
        return text + f"not comparable with a score over all of them (missing: {', '.join(missing)})"
    return f"{text} of {found['highest']:.0f}, over all {scored} domains"


def table(found: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(headings, rows) of a score by domain."""
    columns = ("domain", "top-1 %", "error %", "baseline's error %", "no points from, %", "points")
    keys = ("accuracy", "error", "baseline_error", "max_error")
    rows = []
    for domain, entry in found["domains"].items():
        name = f"{domain} (given)" if domain in found["added"] else domain
        rows.append((name, *(f"{entry[key]:.2f}" for key in keys), f"{entry['points']:.1f}"))
    return columns, rows


def read_baseline(path: Path) -> Baseline:
    """A JSON file {DOMAIN: accuracy in percent}, or {"domains": {...}, "gamma": 2, "points": 1000}.

    Raises MdlError with all faults together.
    """
    content = _read_json(path)
    whole = isinstance(content, dict) and isinstance(content.get("domains"), dict)
    parts = content if whole else {"domains": content}
    faults = [f"{key}: unknown key; {did_you_mean(key, _KEYS)}" for key in parts if key not in _KEYS]
    accuracy = _accuracies(parts["domains"], faults)
    numbers = {key: parts.get(key, default) for key, default in (("gamma", 2.0), ("points", 1000.0))}
    faults += [f"{key}: a number above 0" for key, value in numbers.items() if not (_number(value) and value > 0)]
    faults += [
        f"{d}: at 100% there is no error to measure against" for d, value in accuracy.items() if value == 100
    ]
    _refuse(faults, path, 'e.g. {"aircraft": 60.34, "cifar100": 82.12}')
    return Baseline(path.name, accuracy, float(numbers["gamma"]), float(numbers["points"]))


def read_accuracies(path: Path) -> dict[str, float]:
    """A JSON file {DOMAIN: accuracy in percent}. Raises MdlError with all faults together."""
    faults: list[str] = []
    found = _accuracies(_read_json(path), faults)
    _refuse(faults, path, 'e.g. {"aircraft": 64.21, "cifar100": 81.91}')
    return found


def accuracies_of(metrics: Mapping[str, Any], where: object) -> dict[str, float]:
    """{domain: percent} of an eval's metrics.json; domains without an evaluated clip are left out.

    Raises MdlError for a domain that has no accuracy by its task.
    """
    for domain, entry in metrics["domains"].items():
        check_task(domain, entry["task"], where)
    top1 = {domain: entry["metrics"]["top1"] for domain, entry in metrics["domains"].items()}
    return {domain: 100 * value for domain, value in top1.items() if value is not None}


def check_task(domain: str, task: str, where: object) -> None:
    """Raise MdlError for a domain that has no accuracy."""
    if task != "single_label":
        what = f"the decathlon's score is of accuracies, and {domain} is of the task {task}"
        raise MdlError(what, where, "leave out --decathlon, or this domain")


def parse_added(words: Iterable[str]) -> dict[str, float]:
    """DOMAIN=PERCENT words. Raises MdlError for others."""
    found: dict[str, float] = {}
    for word in words:
        domain, _, text = word.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not domain or not 0 <= value <= 100:
            raise MdlError(
                f"'{word}' is no DOMAIN=PERCENT", "--decathlon-add", "e.g. --decathlon-add imagenet=60.32"
            )
        found[domain] = value
    return found


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise MdlError(f"the file cannot be read ({error.strerror})", path, "check the path") from None
    except ValueError as error:
        raise MdlError(f"this is not valid JSON: {error}", path, "mend the file") from None


def _accuracies(content: object, faults: list[str]) -> dict[str, float]:
    """{domain: percent}, with a fault for whatever is none."""
    if not isinstance(content, dict) or not content:
        faults.append("it is no mapping of domains to accuracies in percent")
        return {}
    bad = {domain: value for domain, value in content.items() if not (_number(value) and 0 <= value <= 100)}
    faults += [f"{domain}: {value!r:.40} is no accuracy in percent, 0 to 100" for domain, value in bad.items()]
    return {domain: float(value) for domain, value in content.items() if domain not in bad}


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _refuse(faults: list[str], path: Path, fix: str) -> None:
    if faults:
        raise MdlError("; ".join(faults), path, fix)
