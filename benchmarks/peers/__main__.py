"""python -m benchmarks.peers: llmserve, its peers and the bare loops on one file, as a table and pictures.

A round runs a workload on one server after the other, each freshly started and all others stopped, beginning with another one
each time. Workloads may be run one at a time: the report is of what was measured last of each.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from benchmarks import harness
from benchmarks.figures import calmest
from benchmarks.peers import client, floors, report, servers
from benchmarks.peers.report import Measured
from benchmarks.peers.servers import Setup
from benchmarks.peers.summary import Summary, summarize
from benchmarks.peers.workloads import WORKLOADS, warm_up

_RESULTS = Path(__file__).parents[1] / "results" / "peers"


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    folder = options.results or _RESULTS / f"{options.threads}-threads-{options.slots}-slots"
    folder.mkdir(parents=True, exist_ok=True)
    servers.install(options.servers)
    setup = servers.set_up(folder, options.threads, options.slots)
    for workload in options.workloads:
        print(f"{workload} …", file=sys.stderr)
        report.keep(measure(workload, options.servers, setup, options.rounds), folder)
    measured = report.kept(folder)
    print(report.write(measured, folder))
    if options.plots:
        from benchmarks.peers import plots

        plots.draw(measured, folder)
    return 0


def measure(workload: str, names: list[str], setup: Setup, rounds: int) -> Measured:
    bare = [name for name in floors.of(workload) if name in names]
    described = {name: servers.describe(name, setup) for name in names if name in servers.NAMES}
    described |= dict.fromkeys(bare, "a bare loop without server, sampler or text")
    found = calmest(rounds, partial(_round, workload, list(described), setup), at_most=rounds + 1)
    return Measured(workload, described, found)


def _round(workload: str, names: list[str], setup: Setup, number: int) -> dict[str, Summary]:
    first = number % len(names)
    return {name: _run(workload, name, setup, number) for name in names[first:] + names[:first]}


def _run(workload: str, name: str, setup: Setup, number: int) -> Summary:
    if name in floors.NAMES:
        before = harness.cpu_times()
        found = floors.run(name, workload, setup)
        return found | {"stolen": harness.steal(before, harness.cpu_times())}
    with servers.start(name, setup) as server:
        client.drive(server.port, warm_up())
        before, computed = harness.cpu_times(), server.cpu_seconds()
        found = summarize(client.drive(server.port, WORKLOADS[workload].scripts(number)))
        found["stolen"] = harness.steal(before, harness.cpu_times())
        found["cpu_per_token"] = (server.cpu_seconds() - computed) / found["num_tokens"]
    keys = (WORKLOADS[workload].key, "cpu_per_token", "stolen", "num_tokens", "client_share")
    shown = {key: round(found[key], 4) for key in keys if key in found}
    print(f"  {number} {name}: {shown}", file=sys.stderr)
    return found


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    names = [*servers.NAMES, *floors.NAMES]
    parser.add_argument("--workloads", nargs="*", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--servers", nargs="*", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--no-plots", dest="plots", action="store_false")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
