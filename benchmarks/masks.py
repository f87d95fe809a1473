"""python -m benchmarks.masks: what part of a decode step grammars take, and what others feel of new ones. Default model, each library.

The first table has what a token's choice and what it means (`Sequence`) take more of CPU time than without a grammar, of the time from
prompts to ends; where streams have passes of their own, of as many cores' time as they can use. A grammar of words alone is the
hardest known, for most of a vocabulary may follow at each place. The second table has the gaps between the tokens of a stream that
has no grammar while clients come whose schemas, large and never seen before, are checked and compiled.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from benchmarks.__main__ import CORES
from benchmarks.sampling import Stopwatch
from llmserve.config import DEFAULT_MODEL, load
from llmserve.engine import matmul
from llmserve.engine.engine import Engine
from llmserve.engine.generation import ChoiceEnd, Delta, GenerationParams, Grammar, SamplingParams
from llmserve.engine.grammar import check
from llmserve.engine.sequence import Sequence
from llmserve.engine.statistics import StatisticsCounter
from llmserve.models.loading import Loader, has_llamacpp

STREAMS, TOKENS, ROUNDS = (1, 8), 40, 3
TOWN = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "kind": {"enum": ["village", "town", "city"]},
        "people": {"type": "integer", "minimum": 0, "maximum": 5000},
        "streets": {"type": "array", "items": {"type": "object", "properties": {"name": {"type": "string"}}}},
    },
    "required": ["name", "kind", "people", "streets"],
}
GRAMMARS = {
    "a JSON object": Grammar("json_schema", '{"type": "object"}'),
    "a schema": Grammar("json_schema", json.dumps(TOWN)),
    "numbers, by a regular expression": Grammar("regex", "([0-9]{1,3}, ){60}"),
    "words, by a regular expression": Grammar("regex", "([a-z]{2,9} ){60}"),
    "words, by a Lark grammar": Grammar("lark", 'start: (WORD " "){60}\nWORD: /[a-zA-Z]{2,9}/'),
}
KINDS = {
    "temperature 1.2": SamplingParams(1.2),
    "greedy": SamplingParams(0),
    "temperature 0.8, top_p 0.95": SamplingParams(0.8, top_p=0.95),
}
BESIDE, PLAIN_TOKENS = 40, 200


def prompt(engine: Engine, text: str) -> list[int]:
    return engine.tokenizer.encode(engine.chat_template.render([{"role": "user", "content": text}]))


class Spent(NamedTuple):
    """CPU seconds for the choice of tokens, the seconds from the first submit to the last token, and the tokens."""

    choosing: float
    passed: float
    num_tokens: int


def spend(engine: Engine, grammar: Grammar | None, sampling: SamplingParams, num_streams: int, stopwatch: Stopwatch) -> Spent:
    stopwatch.seconds, begun, num_tokens = 0.0, time.perf_counter(), 0
    prompt_ids = prompt(engine, "Describe a town by the sea in JSON.")
    params = [GenerationParams(TOKENS, sampling=sampling._replace(seed=seed), grammar=grammar) for seed in range(num_streams)]
    for generation in [engine.submit(prompt_ids, each) for each in params]:
        for event in generation.events(timeout=600):
            num_tokens += event.num_output_tokens if isinstance(event, ChoiceEnd) else 0
    return Spent(stopwatch.seconds, time.perf_counter() - begun, num_tokens)


def share(engine: Engine, grammar: Grammar, sampling: SamplingParams, num_streams: int, stopwatch: Stopwatch) -> float:
    """What the grammar takes, of the time from the first submit to the last token."""
    free = spend(engine, None, sampling, num_streams, stopwatch)
    within = spend(engine, grammar, sampling, num_streams, stopwatch)
    at_once = 1 if engine.info.name == "llamacpp" else min(num_streams, CORES)
    return (within.choosing - within.num_tokens * free.choosing / free.num_tokens) / (at_once * within.passed)


def new_schemas(number: int) -> Iterator[Grammar]:
    """Each of 60 objects of strings, numbers and enums, and unlike any other."""
    for each in range(BESIDE):
        member = {
            "type": "object",
            "properties": {"a": {"type": "string", "pattern": "^[a-z]{3,30}$"}, "b": {"type": "number"}},
        }
        members = {f"m{number}_{each}_{index}": member | {"required": ["a"]} for index in range(60)}
        yield Grammar("json_schema", json.dumps({"type": "object", "properties": members}))


def gaps(engine: Engine, beside: Iterator[Grammar]) -> tuple[list[float], list[float]]:
    """Seconds between the tokens of a plain stream, and those that each grammar beside it took to be checked and compiled."""
    compiled: list[float] = []
    ended = threading.Event()

    def compile_all() -> None:
        for grammar in beside:
            if ended.is_set():
                return
            begun = time.perf_counter()
            check(grammar)
            engine._constraints.get(grammar)
            compiled.append(time.perf_counter() - begun)

    params = GenerationParams(PLAIN_TOKENS, sampling=SamplingParams(temperature=1, seed=1), ignore_eos=True)
    generation = engine.submit(prompt(engine, "Tell me a story."), params)
    times: list[float] = []
    thread = threading.Thread(target=compile_all)
    for event in generation.events(timeout=600):
        if isinstance(event, Delta):
            times.append(time.perf_counter())
            if len(times) == 20:
                thread.start()
    ended.set()
    thread.join()
    return [later - earlier for earlier, later in pairwise(times[20:])], compiled


def open_engine(library: str) -> Engine:
    matmul.process.claim()  # as a server's
    spec = replace(DEFAULT_MODEL, engine=library, slots=max(STREAMS), context_length=512, prompt_lookup=False)
    return Loader(replace(load().server, cores=CORES)).prepare(spec).open(StatisticsCounter())


def main() -> None:
    stopwatch = Stopwatch(time.thread_time)
    Sequence.sample = stopwatch.around(Sequence.sample)  # type: ignore[method-assign]
    Sequence.append = stopwatch.around(Sequence.append)  # type: ignore[method-assign]
    for library in ["ctransformers", *["llamacpp"] * has_llamacpp()]:
        engine = open_engine(library)
        print(f"| {library}, share of a step in {ROUNDS} rounds | " + " | ".join(KINDS) + " |")
        print("|---" * (1 + len(KINDS)) + "|")
        for name, grammar in GRAMMARS.items():
            for num_streams in STREAMS:
                shown = []
                for sampling in KINDS.values():
                    shares = sorted(share(engine, grammar, sampling, num_streams, stopwatch) for _ in range(ROUNDS))
                    shown.append(f"{shares[ROUNDS // 2]:.1%} ({shares[0]:.1%} – {shares[-1]:.1%})")
                print(f"| {name}, {num_streams} at once | " + " | ".join(shown) + " |", flush=True)
        alone, _ = gaps(engine, iter(()))
        beside, compiled = gaps(engine, new_schemas(0))
        print(f"\n| {library} | typical gap | 99 % | longest |\n|---|---|---|---|")
        for name, seconds in (("a stream alone", alone), (f"while {len(compiled)} new schemas come", beside)):
            typical, high = statistics.median(seconds), statistics.quantiles(seconds, n=100)[98]
            print(f"| {name} | {typical * 1e3:.0f} ms | {high * 1e3:.0f} ms | {max(seconds) * 1e3:.0f} ms |")
        print(
            f"| one of them, checked and compiled | {statistics.median(compiled) * 1e3:.0f} ms | | {max(compiled) * 1e3:.0f} ms |\n"
        )
        engine.close()


if __name__ == "__main__":
    main()
