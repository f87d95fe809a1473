"""The bare loops, on prompts of the workload's length, which they read whole: no chat template's beginning is there before."""

from __future__ import annotations

from contextlib import closing

from benchmarks import harness
from benchmarks.harness import Bare
from benchmarks.peers.servers import Setup
from benchmarks.peers.summary import Summary

_NUM_PROMPT_TOKENS = 48
_WORK = {"one_stream": (1, 128), "concurrent_8": (8, 48)}
"""Streams, and tokens of each."""

LLAMA_CPP, CTRANSFORMERS = "bare llama.cpp", "bare ctransformers"
NAMES = [LLAMA_CPP, CTRANSFORMERS]


def of(workload: str) -> list[str]:
    return NAMES if workload in _WORK else []


def run(name: str, workload: str, setup: Setup) -> Summary:
    num_streams, num_tokens = _WORK[workload]
    prompts = harness.random_prompts([_NUM_PROMPT_TOKENS] * num_streams)
    slots = num_streams if name == LLAMA_CPP else 1
    with closing(_start(name, setup)) as bare:
        bare([(slots, setup.threads)], prompts, 4)
        decoding = bare([(slots, setup.threads)], prompts, num_tokens, "decode")
        whole = bare([(slots, setup.threads)], prompts, num_tokens)
    return {
        "decode_rate": (num_tokens - 1) * num_streams / sum(decoding.values()) / slots,
        "output_rate": num_tokens * num_streams / sum(whole.values()),
    }


def _start(name: str, setup: Setup) -> Bare:
    if name == CTRANSFORMERS:
        return Bare(harness.model_path())
    return Bare(setup.model, "benchmarks.bare_batch", *([] if setup.repack else ["plain"]))
