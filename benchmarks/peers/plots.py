"""Pictures of what was measured: a panel for each workload, the gaps that a long prompt makes, and what load does."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.peers.floors import CTRANSFORMERS, LLAMA_CPP
from benchmarks.peers.report import KEYS, Measured
from benchmarks.peers.servers import LLMSERVE
from benchmarks.peers.workloads import POISSON_RATES, WORKLOADS

_COLOURS = {
    LLMSERVE: "#1b6ca8",
    "llama-server": "#e08214",
    "llama_cpp.server": "#9e9ac8",
    LLAMA_CPP: "#636363",
    CTRANSFORMERS: "#bdbdbd",
}


def draw(measured: dict[str, Measured], folder: Path) -> None:
    """workloads.png, latencies.png and, where there are such workloads, poisson.png."""
    _workloads({name: each for name, each in measured.items() if name not in POISSON_RATES}, folder / "workloads.png")
    _latencies(measured, folder / "latencies.png")
    _poisson({rate: measured[name] for name, rate in POISSON_RATES.items() if name in measured}, folder / "poisson.png")


def _workloads(measured: dict[str, Measured], path: Path) -> None:
    """Each workload's figure that is compared, with its least and most."""
    figure, panels = _panels(len(measured))
    for panel, (name, each) in zip(panels, measured.items(), strict=False):
        key = WORKLOADS[name].key
        _bars(panel, each, key)
        panel.set_title(WORKLOADS[name].title, fontsize=8, wrap=True)
    figure.savefig(path, dpi=100)


def _latencies(measured: dict[str, Measured], path: Path) -> None:
    """Time to the first content of each workload: half of the requests, and behind it the slowest."""
    figure, panels = _panels(len(measured))
    for panel, (name, each) in zip(panels, measured.items(), strict=False):
        servers = _served(each, "ttft_p50")
        colours = [_COLOURS[server] for server in servers]
        for key, alpha in (("ttft_p99", 0.35), ("ttft_p50", 1.0)):
            medians = [statistics.median(each.values(server, key)) for server in servers]
            panel.barh(range(len(servers)), medians, color=colours, alpha=alpha)
        panel.set_yticks(range(len(servers)), servers, fontsize=7)
        panel.invert_yaxis()
        panel.set_xlabel("TTFT in ms: p50, and p99 in pale (less is better)", fontsize=7)
        panel.set_title(WORKLOADS[name].title, fontsize=8, wrap=True)
    figure.savefig(path, dpi=130)


def _poisson(measured: dict[float, Measured], path: Path) -> None:
    """Latency and goodput over the rate of arrivals."""
    if not measured:
        return
    figure, panels = _panels(3)
    servers = dict.fromkeys(server for each in measured.values() for server in _served(each, "ttft_p50"))
    for panel, key in zip(panels, ("ttft_p50", "ttft_p99", "goodput"), strict=True):
        for server in servers:
            points = {rate: each.values(server, key) for rate, each in measured.items() if each.values(server, key)}
            medians = [statistics.median(values) for values in points.values()]
            panel.plot(list(points), medians, "o-", color=_COLOURS[server], label=server)
            panel.fill_between(
                list(points), [*map(min, points.values())], [*map(max, points.values())], color=_COLOURS[server], alpha=0.15
            )
        title, unit, _ = KEYS[key]
        panel.set_ylabel(f"{title} in {unit}", fontsize=8)
        panel.set_xlabel("requests per second (Poisson)", fontsize=8)
        panel.set_ylim(bottom=0)
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=130)


def _bars(panel: Axes, measured: Measured, key: str) -> None:
    title, unit, _ = KEYS[key]
    servers = _served(measured, key)
    values = [measured.values(server, key) for server in servers]
    medians = [statistics.median(each) for each in values]
    below = [median - min(each) for median, each in zip(medians, values, strict=True)]
    above = [max(each) - median for median, each in zip(medians, values, strict=True)]
    colours = [_COLOURS[server] for server in servers]
    panel.barh(range(len(servers)), medians, xerr=[below, above], color=colours, error_kw={"lw": 1, "ecolor": "#333333"})
    numbers = [f"{median:,.0f}" if median >= 100 else f"{median:.3g}" for median in medians]
    labels = [f"{server}\n{number}" for server, number in zip(servers, numbers, strict=True)]
    panel.set_yticks(range(len(servers)), labels, fontsize=7)  # beside the bars, some of which are too short for a number
    panel.invert_yaxis()
    panel.set_xlabel(f"{title} in {unit} ({'more' if unit.endswith('/s') else 'less'} is better)", fontsize=7)


def _served(measured: Measured, key: str) -> list[str]:
    return [server for server in measured.servers if measured.values(server, key)]


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(3, max(1, count))
    rows = max(1, math.ceil(count / columns))
    figure = Figure(figsize=(4.6 * columns, 2.6 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels[count:]:
        panel.set_axis_off()
    for panel in panels:
        panel.tick_params(labelsize=7)
    return figure, panels
