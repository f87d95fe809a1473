"""The floors: bare ctransformers loops in a process of their own, without server, sampler or text.

`python -m benchmarks.bare FILE` reads one JSON command per line and answers with one JSON line:
{"splits": [[slots, threads], …], "prompts": [[ids], …], "num_tokens": n} → {"slots×threads": seconds, …} for the whole
work: prefill each prompt, decode n tokens, greedy, on `slots` objects at once with `threads` threads each. With "only":
"decode" the seconds are those of the decode loop alone.
"""

from __future__ import annotations

import ctypes
import json
import queue
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
from ctransformers.llm import LLM, Config

CONTEXT_LENGTH = 2048
PREFILL_CHUNK = 128


class Loop:
    """One ctransformers object."""

    def __init__(self, path: str) -> None:
        self.llm = LLM(path, "gguf", config=Config(context_length=CONTEXT_LENGTH), lib="avx2")
        address = ctypes.addressof(self.llm.ctransformers_llm_logits_data().contents)
        self.logits = np.ctypeslib.as_array((ctypes.c_float * self.llm.vocab_size).from_address(address))
        self.eval = self.llm.ctransformers_llm_batch_eval

    def run(self, prompt_ids: list[int], num_tokens: int, threads: int) -> float:
        """Seconds of the decode part."""
        buffer = (ctypes.c_int * len(prompt_ids))(*prompt_ids)
        self.eval(buffer, len(prompt_ids), 0, PREFILL_CHUNK, threads)
        one = (ctypes.c_int * 1)()
        begun = time.perf_counter()
        for step in range(num_tokens - 1):
            one[0] = int(self.logits.argmax())
            self.eval(one, 1, len(prompt_ids) + step, 1, threads)
        return time.perf_counter() - begun


def run(loops: list[Loop], prompts: list[list[int]], num_tokens: int, threads: int) -> tuple[float, float]:
    """(seconds of all the work, seconds of decoding in all) with one thread per loop taking prompts as they come."""
    work: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    decoding: list[float] = []
    for prompt in prompts:
        work.put(prompt)

    def take(loop: Loop) -> None:
        while True:
            try:
                prompt = work.get_nowait()
            except queue.Empty:
                return
            decoding.append(loop.run(prompt, num_tokens, threads))

    workers = [threading.Thread(target=take, args=(loop,)) for loop in loops]
    begun = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - begun, sum(decoding)


def serve(run: Callable[[int, int, list[list[int]], int], tuple[float, float]]) -> None:
    """Answer the commands of standard input with what `run` says of (slots, threads, prompts, num_tokens)."""
    for line in sys.stdin:
        command = json.loads(line)
        answer = {}
        for slots, threads in command["splits"]:
            whole, decoding = run(slots, threads, command["prompts"], command["num_tokens"])
            answer[f"{slots}x{threads}"] = decoding if command.get("only") == "decode" else whole
        print(json.dumps(answer), flush=True)


def main(path: str) -> None:
    loops: list[Loop] = []

    def work(slots: int, threads: int, prompts: list[list[int]], num_tokens: int) -> tuple[float, float]:
        while len(loops) < slots:
            loops.append(Loop(path))
        return run(loops[:slots], prompts, num_tokens, threads)

    serve(work)


if __name__ == "__main__":
    main(sys.argv[1])
