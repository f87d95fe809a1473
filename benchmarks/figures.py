"""Ratios of what was measured side by side, and which rounds of it count."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from benchmarks import harness

T = TypeVar("T")

_QUIET = 0.02
"""Share of the cores' time that another virtual machine may take in a round that counts."""


@dataclass(frozen=True)
class Figure:
    """One line of the report: the median over the rounds of `ours` to `other`, and what it should be.

    A round's two measurements stand next to each other in time, which the medians of both sides do not: the machine's
    speed changes from minute to minute.
    """

    name: str
    unit: str
    ours: list[float]
    other: list[float]
    other_name: str
    limit: str

    @property
    def ratio(self) -> float:
        other = self.other * len(self.ours) if len(self.other) == 1 else self.other
        return statistics.median(ours / theirs for ours, theirs in zip(self.ours, other, strict=True))

    @property
    def holds(self) -> bool:
        comparison, limit = self.limit.split()
        return self.ratio >= float(limit) if comparison == "≥" else self.ratio <= float(limit)

    def row(self) -> str:
        mark = "yes" if self.holds else "**no**"
        return (
            f"| {self.name} | {spread(self.ours)} {self.unit} | {self.other_name} {spread(self.other)} {self.unit} "
            f"| {self.ratio:.3g} | {self.limit} | {mark} |"
        )


HEAD = "| figure | llmserve | other | ratio | should be | holds |\n|---|---|---|---|---|---|\n"


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.4g} ({min(values):.4g} – {max(values):.4g})"


def calmest(rounds: int, measure: Callable[[int], T], at_most: int | None = None) -> list[T]:
    """What `rounds` calls of `measure` gave, those with the least steal.

    A virtual machine's cores are sometimes given to another one in the middle of a round, mostly in one side's half of it.
    So a round with more than a little of that is measured again, up to `at_most` rounds, or three times as many, in all.
    """
    measured: list[tuple[float, T]] = []
    for number in range(at_most or 3 * rounds):
        before = harness.cpu_times()
        result = measure(number)
        measured.append((harness.steal(before, harness.cpu_times()), result))
        if sum(stolen <= _QUIET for stolen, _ in measured) >= rounds:
            break
    measured.sort(key=lambda each: each[0])
    print(
        f"  {len(measured)} rounds; {measured[rounds - 1][0]:.1%} of the cores or less stolen in those that count",
        file=sys.stderr,
    )
    return [result for _, result in measured[:rounds]]


def paired(rounds: int, measure: Callable[[int], tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Both sides' values of the calmest rounds."""
    ours, other = zip(*calmest(rounds, measure), strict=True)
    return list(ours), list(other)
