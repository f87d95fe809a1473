"""From what clients saw to figures.

TTFT: request sent to first non-empty content. ITL: between two contents of a stream. E2E: request sent to last byte. Output
rate: all completion tokens over the seconds from the first request sent to the last byte of all. Decode rate: all streams' tokens
but each one's first over the seconds from its first to its last content, added up. Goodput: requests per second that met `SLO`.
"""

from __future__ import annotations

import itertools
import statistics
from typing import NamedTuple

from benchmarks.harness import Stream
from benchmarks.peers.client import Answer, Trace

Summary = dict[str, float]


class Objective(NamedTuple):
    """Seconds to the first content, and between contents on average, that a request may take at most."""

    ttft: float
    mean_itl: float

    def is_met(self, stream: Stream) -> bool:
        return stream.first <= self.ttft and statistics.fmean(itls(stream) or [0.0]) <= self.mean_itl


SLO = Objective(ttft=1.0, mean_itl=0.1)


def percentile(values: list[float], percent: float) -> float:
    """By linear interpolation between the two nearest values (numpy's default). Raises ValueError when there are none."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def itls(stream: Stream) -> list[float]:
    return [later - earlier for earlier, later in zip(stream.times, stream.times[1:], strict=False)]


def disturbed_itls(answers: list[Answer]) -> list[float]:
    """Gaps of the other streams that reach into the time between the long prompt's sending and its first content."""
    found = []
    for long in (answer for answer in answers if answer.role == "long"):
        begin, end = long.sent, long.sent + long.stream.first
        for other in (answer for answer in answers if answer.role != "long"):
            moments = [other.sent + time for time in other.stream.times]
            found += [b - a for a, b in itertools.pairwise(moments) if b > begin and a < end]
    return found


def summarize(trace: Trace) -> Summary:
    streams = [answer.stream for answer in trace.answers]
    seconds = max(answer.sent + answer.stream.total for answer in trace.answers)
    num_tokens = sum(stream.num_tokens for stream in streams)
    summary = {
        "seconds": seconds,
        "num_tokens": num_tokens,
        "num_cut": sum(stream.finish_reason == "length" for stream in streams),
        "num_requests": len(streams),
        "num_prompt_tokens": sum(stream.num_prompt_tokens for stream in streams),
        "num_cached_tokens": sum(stream.num_cached_tokens for stream in streams),
        "output_rate": num_tokens / seconds,
        "goodput": sum(map(SLO.is_met, streams)) / seconds,
        "client_share": trace.client_seconds / seconds,
    }
    summary |= _percentiles("ttft", [stream.first for stream in streams])
    summary |= _percentiles("itl", [gap for stream in streams for gap in itls(stream)])
    summary |= _percentiles("e2e", [stream.total for stream in streams])
    summary |= _percentiles("disturbed_itl", disturbed_itls(trace.answers))
    if rate := decode_rate(streams):
        summary["decode_rate"] = rate
    again = [answer.stream.total for answer in trace.answers if answer.role == "again"]
    return summary | ({"again_e2e": statistics.median(again)} if again else {})


def decode_rate(streams: list[Stream]) -> float:
    """Of those that did not come in one piece, as remembered answers do; 0 if there are none."""
    decoded = [(stream.num_tokens - 1, stream.last - stream.first) for stream in streams if stream.last > stream.first]
    seconds = sum(passed for _, passed in decoded)
    return sum(tokens for tokens, _ in decoded) / seconds if seconds else 0.0


def _percentiles(name: str, values: list[float]) -> Summary:
    return {f"{name}_p{percent}": percentile(values, percent) for percent in (50, 99)} if values else {}
