"""Both libraries on one file: the same text gets the same probabilities. And one of them, whatever else it does."""

import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmserve.config import DEFAULT_MODEL, load
from llmserve.engine.generation import Delta, GenerationEnd, GenerationParams, SamplingParams
from llmserve.engine.statistics import StatisticsCounter
from llmserve.models.loading import Loader, has_llamacpp

pytestmark = pytest.mark.skipif(not has_llamacpp(), reason="llama-cpp-python, the extra `llamacpp`, is not installed")

TEXT = """The river rises in the hills behind the town, where the rain of the winter months gathers in a chain of small lakes. \
For two hundred years the people here have built mills along it: first for grain, then for wool, and at last for electric light. \
When the railway came in 1871, most of the mills were closed, and the youngest families moved to the coast. What remains is a quiet \
place with a bridge of five arches, a market on Thursdays and a school with ninety children. The mayor, who is also the baker, says \
that nothing ever happens, and that this is exactly why he would not live anywhere else."""


def log_probabilities(logits):
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def test_the_two_libraries_agree_on_a_real_text():
    from llmserve.engine.backend import Piece
    from llmserve.engine.ctransformers_backend import CTransformersBackend
    from llmserve.engine.llamacpp_backend import LlamaCppBackend, LlamaCppSettings

    loader = Loader(load().server)
    old, new = (loader.prepare(replace(DEFAULT_MODEL, engine=engine)).model for engine in ("ctransformers", "llamacpp"))
    theirs = CTransformersBackend(old.path, 512)
    ours = LlamaCppBackend(new.path, 512, 1, 64, LlamaCppSettings(repack=new.repack))
    try:
        token_ids = ours.tokenize(TEXT.encode())
        divergences, same = [], 0
        for position, token_id in enumerate(token_ids):
            theirs.forward([token_id], position, 1)
            ours.forward([Piece(0, position, [token_id], True)], 1)
            a, b = log_probabilities(theirs.logits()), log_probabilities(ours.logits(0))
            divergences.append(float((np.exp(a) * (a - b)).sum()))
            same += int(a.argmax() == b.argmax())
    finally:
        theirs.close()
        ours.close()
    print(
        f"{len(token_ids)} tokens: mean KL {np.mean(divergences):.5f} nats, most {max(divergences):.5f}; same best token: {same}"
    )
    assert len(token_ids) > 100
    assert np.mean(divergences) <= 0.02


def test_a_file_that_is_opened_leaves_no_threads_behind():
    """Where the library rearranges weights with several, all of a later pass would sleep for them."""
    from llmserve.engine.llamacpp_backend import LlamaCppBackend, LlamaCppSettings

    model = Loader(load().server).prepare(replace(DEFAULT_MODEL, engine="llamacpp", weights="file")).model
    before = num_threads()
    with closing(LlamaCppBackend(model.path, 512, 1, 64, LlamaCppSettings(repack=model.repack))):
        assert num_threads() == before


def num_threads():
    return len(list(Path("/proc/self/task").iterdir())) if sys.platform == "linux" else 0


@pytest.mark.parametrize("kernels", [{}, {"flash_attention": "off"}, {"kv_type": "q8_0"}], ids=["fused", "plain", "quantized"])
def test_an_answer_is_the_same_to_the_last_bit_alone_among_eight_and_with_shared_prefixes(kernels):
    """Log-probabilities are compared, of prompts whose lengths lie on both sides of where they are cut."""

    def engine(cores, **options):
        loader = Loader(replace(load().server, cores=cores))
        spec = replace(DEFAULT_MODEL, engine="llamacpp", slots=8, context_length=512, **kernels, **options)
        return closing(loader.prepare(spec).open(StatisticsCounter()))

    def submit(engine, prompt_ids):
        return engine.submit(
            prompt_ids, GenerationParams(12, sampling=SamplingParams(temperature=0), logprobs=2, ignore_eos=True)
        )

    def scores_of(generation):
        *events, end = generation.events(120)
        assert isinstance(end, GenerationEnd)
        return [score for event in events if isinstance(event, Delta) for score in event.tokens], end.num_cached_tokens

    with engine(cores=2, prefix_cache=False) as lone, engine(cores=2) as shared, engine(cores=1) as slow:
        token_ids = lone.tokenizer.encode([*lone.chat_template.render([{"role": "user", "content": TEXT}])])
        prompts = [token_ids[:length] for length in (20, 63, 64, 65, 100, 128, 129)] + [token_ids[30:120]]
        alone = [scores_of(submit(lone, prompt_ids))[0] for prompt_ids in prompts]
        assert all(len(scores) == 12 for scores in alone)
        num_cached = 0
        for engine_of_many in (shared, slow):
            for _ in range(2):
                together = [submit(engine_of_many, prompt_ids) for prompt_ids in prompts]
                for generation, expected in zip(together, alone, strict=True):
                    scores, num_cached_here = scores_of(generation)
                    assert scores == expected
                    num_cached += num_cached_here
        assert num_cached > 400
