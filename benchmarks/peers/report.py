"""Measured rounds, as they are kept in the results folder, and what is written of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.figures import HEAD, Figure, spread
from benchmarks.peers import summary
from benchmarks.peers.floors import LLAMA_CPP
from benchmarks.peers.servers import LLMSERVE
from benchmarks.peers.summary import Summary
from benchmarks.peers.workloads import WORKLOADS

KEYS = {
    "decode_rate": ("decode rate", "tokens/s", 1.0),
    "output_rate": ("output rate", "tokens/s", 1.0),
    "seconds": ("time in all", "s", 1.0),
    "again_e2e": ("E2E of the repeated", "ms", 1e3),
    "disturbed_itl_p99": ("others' ITL p99 meanwhile", "ms", 1e3),
    "goodput": ("goodput", "requests/s", 1.0),
    "cpu_per_token": ("CPU time per output token", "ms", 1e3),
    "ttft_p50": ("TTFT p50", "ms", 1e3),
    "ttft_p99": ("TTFT p99", "ms", 1e3),
    "itl_p50": ("ITL p50", "ms", 1e3),
    "itl_p99": ("ITL p99", "ms", 1e3),
    "e2e_p50": ("E2E p50", "ms", 1e3),
    "e2e_p99": ("E2E p99", "ms", 1e3),
    "num_tokens": ("output", "tokens", 1.0),
    "client_share": ("client's CPU", "% of a core", 100.0),
}
"""Title and unit of a summary's figures, and what they are multiplied with."""

_COLUMNS = [
    "output_rate",
    "decode_rate",
    "ttft_p50",
    "ttft_p99",
    "itl_p50",
    "itl_p99",
    "e2e_p50",
    "e2e_p99",
    "goodput",
    "cpu_per_token",
    "num_tokens",
    "client_share",
]


class Measured(NamedTuple):
    """Of one workload: what each server is, and its summary in each round that counts."""

    workload: str
    servers: dict[str, str]
    rounds: list[dict[str, Summary]]

    def values(self, server: str, key: str) -> list[float]:
        """In the unit of `KEYS`; empty where the server, or the figure, is not there."""
        factor = KEYS[key][2]
        return [factor * each[server][key] for each in self.rounds if key in each.get(server, {})]


class Target(NamedTuple):
    """llmserve's figure in a workload, against a server's, or its own in another workload."""

    workload: str
    key: str
    other: str
    limit: str
    other_workload: str = ""


TARGETS = [
    Target("one_stream", "decode_rate", LLAMA_CPP, "≥ 0.95"),
    Target("one_stream", "decode_rate", "llama-server", "≥ 1.1"),
    Target("concurrent_8", "output_rate", "llama-server", "≥ 1.1"),
    Target("concurrent_32", "output_rate", LLMSERVE, "≥ 0.95", other_workload="concurrent_8"),
    Target("shared_prefix", "seconds", "llama-server", "≤ 0.333"),
    Target("turns", "output_rate", "llama-server", "≥ 1.1"),
    Target("long_prompt", "disturbed_itl_p99", "llama-server", "≤ 1"),
    Target("repeated", "again_e2e", "llama-server", "≤ 0.01"),
]


def keep(measured: Measured, folder: Path) -> None:
    (folder / f"{measured.workload}.json").write_text(json.dumps(measured._asdict(), indent=1))


def kept(folder: Path) -> dict[str, Measured]:
    """What was measured last of each workload."""
    files = {name: folder / f"{name}.json" for name in WORKLOADS}
    return {name: Measured(**json.loads(path.read_text())) for name, path in files.items() if path.exists()}


def figures(measured: dict[str, Measured]) -> Iterator[Figure]:
    """The targets' figures, as far as both sides were measured."""
    for target in TARGETS:
        other_workload = target.other_workload or target.workload
        if target.workload not in measured or other_workload not in measured:
            continue
        ours = measured[target.workload].values(LLMSERVE, target.key)
        other = measured[other_workload].values(target.other, target.key)
        title, unit, _ = KEYS[target.key]
        name = f"{WORKLOADS[target.workload].title}: {title}"
        count = min(len(ours), len(other))
        if count:
            beside = f" ({target.other_workload})" if target.other_workload else ""
            yield Figure(name, unit, ours[:count], other[:count], target.other + beside, target.limit)


def write(measured: dict[str, Measured], folder: Path) -> str:
    """report.md and report.json; the text of the first."""
    found = list(figures(measured))
    text = "\n".join(["# llmserve and its peers", *_definitions(), *_servers(measured), "## Ratios", ""])
    text += "\nMedians of the rounds that count (least – most); the ratio is the median of the rounds' ratios.\n\n"
    text += HEAD + "".join(figure.row() + "\n" for figure in found)
    text += "\n".join(["", "## Workloads", *(line for each in measured.values() for line in _table(each))]) + "\n"
    (folder / "report.md").write_text(text)
    (folder / "report.json").write_text(json.dumps(_as_json(found, measured), indent=1))
    return text


def _definitions() -> list[str]:
    assert summary.__doc__ is not None
    definitions = summary.__doc__.split("\n\n", 1)[1].strip()
    objective = f"TTFT ≤ {summary.SLO.ttft:g} s and mean ITL ≤ {summary.SLO.mean_itl:g} s"
    return ["", definitions.replace("`SLO`", objective), ""]


def _servers(measured: dict[str, Measured]) -> list[str]:
    servers = {name: what for each in measured.values() for name, what in each.servers.items()}
    return [*(f"- **{name}**: {what}" for name, what in servers.items()), ""]


def _table(measured: Measured) -> list[str]:
    """A row for each server: its medians, the figure that is compared with its spread."""
    workload = WORKLOADS[measured.workload]
    key_title, key_unit, _ = KEYS[workload.key]
    columns = [key for key in _COLUMNS if key != workload.key]
    heads = [f"{KEYS[key][0]} {KEYS[key][1]}" for key in columns]
    lines = ["", f"### {workload.title}", "", f"| | {key_title} {key_unit} | {' | '.join(heads)} | steal |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    for server in measured.servers:
        values = measured.values(server, workload.key)
        key = spread(values) if values else "–"
        cells = [_median(measured.values(server, column)) for column in columns]
        stolen = statistics.median(each[server]["stolen"] for each in measured.rounds)
        lines.append(f"| {server} | {key} | {' | '.join(cells)} | {stolen:.1%} |")
    return lines


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.4g}" if values else "–"


def _as_json(found: list[Figure], measured: dict[str, Measured]) -> dict[str, Any]:
    return {
        "figures": [vars(figure) | {"ratio": figure.ratio, "holds": figure.holds} for figure in found],
        "workloads": {name: each._asdict() for name, each in measured.items()},
    }
