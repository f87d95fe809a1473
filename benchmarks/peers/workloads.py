"""What is asked of each server: the same bytes, at the same times.

All prompts are such that the model's answer is longer than its limit, so every server makes equally many tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks.harness import chat_request, story
from benchmarks.peers.client import Request, Script


class Workload(NamedTuple):
    """`scripts` makes the clients of a round, by its number: other prompts in each. `key` is the figure that is compared."""

    title: str
    scripts: Callable[[int], list[Script]]
    key: str


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _ask(content: str, max_tokens: int, *, system: str = "", store: bool = False) -> Request:
    messages = [{"role": "system", "content": system}] if system else []
    return Request(chat_request([*messages, _user(content)], max_tokens, store=store))


def _send(requests: Iterator[Request]) -> Script:
    """A client that sends them one after the other; several may share an iterator."""
    return (request for request in requests)  # no `yield from`: a list's iterator is sent nothing


def _each(requests: list[Request]) -> list[Script]:
    """A client for each."""
    return [_send(iter([request])) for request in requests]


def _stories(count: int, max_tokens: int, number: int) -> list[Request]:
    return [_ask(story(n + 100 * number), max_tokens) for n in range(count)]


def one_stream(number: int) -> list[Script]:
    """One after the other, for some repeat themselves, which prompt lookup makes twice as fast, and others do not."""
    return [_send(iter(_stories(6, 128, number)))]


def concurrent_8(number: int) -> list[Script]:
    return _each(_stories(8, 48, number))


def concurrent_32(number: int) -> list[Script]:
    return _each(_stories(32, 48, number))


def shared_prefix(number: int) -> list[Script]:
    rules = " ".join(f"Rule {n}: always be polite, brief and exact, and never speak of topic number {n}." for n in range(21))
    system = f"You are storyteller number {number}. {rules}"
    requests = iter([_ask(story(n), 16, system=system) for n in range(16)])
    return [_send(requests) for _ in range(8)]


def turns(number: int) -> list[Script]:
    return [_conversation([story(n + 4 * turn + 100 * number) for turn in range(4)]) for n in range(4)]


def _conversation(wishes: list[str]) -> Script:
    messages: list[dict[str, str]] = []
    for wish in wishes:
        messages = [*messages, _user(wish)]
        stream = yield Request(chat_request(messages, 32))
        assert stream is not None
        messages = [*messages, {"role": "assistant", "content": stream.text}]


def long_prompt(number: int) -> list[Script]:
    """Four streams, and when they run, a prompt of some 1,250 tokens."""
    facts = " ".join(f"Fact {n} of {number}: the {story(n).split('about ')[1]}" for n in range(48))
    arriving = _ask(f"{facts} Write a very long story with all of this.", 8)
    return _each([*_stories(4, 96, number), arriving._replace(beside=4, role="long")])


def repeated(number: int) -> list[Script]:
    """One request, and then the same again."""
    request = _ask(story(100 * number), 64, store=True)
    return [_send(iter([request, *[request._replace(role="again")] * 3]))]


def _poisson(rate: float, seconds: float = 10.0) -> Callable[[int], list[Script]]:
    """Requests whose distances are exponentially distributed, whatever becomes of those before."""

    def scripts(number: int) -> list[Script]:
        draw = random.Random(number)
        moments = []
        moment = draw.expovariate(rate)
        while moment < seconds:
            moments.append(moment)
            moment += draw.expovariate(rate)
        return _each([_ask(story(n + 100 * number), 32)._replace(at=moment) for n, moment in enumerate(moments or [0.0])])

    return scripts


POISSON_RATES = {"poisson_low": 0.5, "poisson_middle": 1.0, "poisson_high": 2.0}
"""Requests per second."""

WORKLOADS: dict[str, Workload] = {
    "one_stream": Workload("one stream: 6 answers of 128 tokens, one after the other", one_stream, "decode_rate"),
    "concurrent_8": Workload("8 distinct prompts at once, 48 tokens each", concurrent_8, "output_rate"),
    "concurrent_32": Workload("32 distinct prompts at once, 48 tokens each", concurrent_32, "output_rate"),
    "shared_prefix": Workload("16 requests with one 400-token system prompt, 8 at a time, 16 tokens each", shared_prefix, "seconds"),
    "turns": Workload("4 conversations of 4 turns, 32 tokens each", turns, "output_rate"),
    "long_prompt": Workload("a prompt of 1,250 tokens arrives among 4 streams of 96 tokens", long_prompt, "disturbed_itl_p99"),
    "repeated": Workload("one request again, 64 tokens", repeated, "again_e2e"),
} | {
    name: Workload(f"Poisson arrivals for 10 s, {rate:g} requests/s, 32 tokens each", _poisson(rate), "goodput")
    for name, rate in POISSON_RATES.items()
}  # fmt: skip


def warm_up() -> list[Script]:
    """Something else, so that every slot's memory was touched before."""
    return _each([_ask(f"Count to {n} hundred.", 4) for n in range(1, 9)])
