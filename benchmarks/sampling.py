"""python -m benchmarks.sampling: what part of a step is the choice of tokens, at 8 streams and a vocabulary of 262,144.

The model has the shape of a small one of today with such a vocabulary (18 layers of 640, feed-forward of 2,048) and random
weights, with scores spread as a trained model's are: a few likely tokens. Both times are of the engine's thread, CPU and waiting.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import gguf
import numpy as np

from benchmarks.__main__ import CORES
from llmserve.config import ModelSpec, ServerConfig
from llmserve.engine import matmul
from llmserve.engine.generation import GenerationParams, SamplingParams
from llmserve.engine.sequence import Sequence
from llmserve.engine.statistics import StatisticsCounter
from llmserve.models.loading import Loader

VOCABULARY, WIDTH, LAYERS, FEED_FORWARD, HEADS, KV_HEADS, HEAD = 262_144, 640, 18, 2048, 4, 1, 256
STREAMS, TOKENS, ROUNDS = 8, 24, 3
SPREAD = 5.0  # standard deviation of the scores
KINDS = {
    "greedy": SamplingParams(temperature=0),
    "temperature 1": SamplingParams(seed=1),
    "temperature 0.8, top_p 0.95": SamplingParams(temperature=0.8, top_p=0.95, seed=1),
    "temperature 0.8, top_k 40, top_p 0.95": SamplingParams(temperature=0.8, top_k=40, top_p=0.95, seed=1),
    "temperature 0.8, min_p 0.05, penalties": SamplingParams(
        0.8, min_p=0.05, presence_penalty=0.5, frequency_penalty=0.5, seed=1
    ),
}


def write_model(path: Path) -> Path:
    """A Qwen3 of this shape, Q8_0, output tied to the embedding."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_context_length(2048)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(VOCABULARY)])
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCABULARY)
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(0)

    def add(name: str, rows: int, columns: int) -> None:
        weights = rng.standard_normal((rows, columns), dtype=np.float32) / np.sqrt(np.float32(columns))
        writer.add_tensor(
            name, gguf.quantize(weights, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0
        )

    add("token_embd.weight", VOCABULARY, WIDTH)
    writer.add_tensor("output_norm.weight", np.full(WIDTH, SPREAD, np.float32))
    for i in range(LAYERS):
        for norm, size in (("attn", WIDTH), ("ffn", WIDTH), ("attn_q", HEAD), ("attn_k", HEAD)):
            writer.add_tensor(f"blk.{i}.{norm}_norm.weight", np.ones(size, np.float32))
        add(f"blk.{i}.attn_q.weight", HEADS * HEAD, WIDTH)
        add(f"blk.{i}.attn_k.weight", KV_HEADS * HEAD, WIDTH)
        add(f"blk.{i}.attn_v.weight", KV_HEADS * HEAD, WIDTH)
        add(f"blk.{i}.attn_output.weight", WIDTH, HEADS * HEAD)
        add(f"blk.{i}.ffn_gate.weight", FEED_FORWARD, WIDTH)
        add(f"blk.{i}.ffn_up.weight", FEED_FORWARD, WIDTH)
        add(f"blk.{i}.ffn_down.weight", WIDTH, FEED_FORWARD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Stopwatch:
    """Adds up what calls of a function take, by any clock."""

    def __init__(self, clock=time.perf_counter) -> None:
        self.seconds = 0.0
        self._clock = clock

    def around(self, function):
        def timed(*arguments):
            begun = self._clock()
            result = function(*arguments)
            self.seconds += self._clock() - begun
            return result

        return timed


def share(engine, params: SamplingParams, stopwatch: Stopwatch) -> float:
    """Of the time from the first prompt to the last token, prompts of one token each."""
    stopwatch.seconds, begun = 0.0, time.perf_counter()
    generations = [engine.submit([10 + number], GenerationParams(TOKENS, sampling=params)) for number in range(STREAMS)]
    for generation in generations:
        for _ in generation.events(timeout=600):
            pass
    return stopwatch.seconds / (time.perf_counter() - begun)


def main() -> None:
    matmul.process.claim()  # as a server's
    stopwatch = Stopwatch()
    Sequence.sample = stopwatch.around(Sequence.sample)
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder) / "model.gguf")
        spec = ModelSpec(
            id="model", source=str(path), slots=STREAMS, context_length=256, prompt_lookup=False, engine="llamacpp"
        )
        engine = Loader(ServerConfig(cache_dir=folder, cores=CORES)).prepare(spec).open(StatisticsCounter())
        print(
            f"| sampling, {STREAMS} streams, {VOCABULARY} tokens | share of a step, {ROUNDS} rounds | at most |\n|---|---|---|"
        )
        for name, params in KINDS.items():
            shares = sorted(share(engine, params, stopwatch) for _ in range(ROUNDS))
            print(f"| {name} | {shares[ROUNDS // 2]:.1%} ({shares[0]:.1%} – {shares[-1]:.1%}) | 10 % |", flush=True)
        engine.close()


if __name__ == "__main__":
    main()
