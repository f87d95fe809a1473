import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.engine import gguf
from llmserve.engine.ctransformers_backend import CTransformersBackend
from llmserve.models import adapt
from tests import tiny_models
from tests.tiny_models import CONTEXT_LENGTH

pytestmark = pytest.mark.slow

TEXTS = [
    "hello world",
    "  two  spaces ",
    "a\nb\tc",
    "🦙🦙🏽 née Ünïcødé",
    "日本語のテキスト",
    "\u200d\ufffd",
    "\x01",
    "é" * 500,
]
GRID = CTransformersBackend.grid


def adapted(folder, path):
    header = gguf.read(path)
    return adapt.adapt(path, header, adapt.plan(header, CONTEXT_LENGTH), folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "spm": tiny_models.write_llama_spm(folder / "spm.gguf"),
        "bpe": adapted(folder, tiny_models.write_llama_bpe(folder / "bpe.gguf")),
        "falcon": adapted(folder, tiny_models.write_falcon_bpe(folder / "falcon.gguf")),
        "gpt2": tiny_models.write_ggml_gpt2(folder / "gpt2.bin"),
    }


@pytest.fixture
def open_backend(files):
    """Open a tiny model by its name, as often as wanted; all are closed after the test."""
    with ExitStack() as opened:
        yield lambda name: opened.enter_context(
            closing(CTransformersBackend(files[name], CONTEXT_LENGTH, "gpt2" if name == "gpt2" else ""))
        )


def some_ids(length, seed=0):
    return random.Random(seed).choices(range(3, 300), k=length)


def prefill(backend, token_ids, cuts=(), threads=1):
    """The scores after `token_ids`, evaluated in chunks that end at `cuts` and at the end."""
    for begin, end in pairwise([0, *cuts, len(token_ids)]):
        backend.forward(token_ids[begin:end], begin, threads)
    return backend.logits().copy()


def decode(backend, token_ids, count):
    """The scores of `count` greedy steps after `token_ids`, one by one."""
    scores = [prefill(backend, token_ids)]
    for position in range(len(token_ids), len(token_ids) + count):
        backend.forward([int(np.argmax(scores[-1]))], position, 1)
        scores.append(backend.logits().copy())
    return np.array(scores)


@pytest.mark.parametrize(("name", "vocab_size"), [("spm", 415), ("bpe", 320), ("falcon", 320), ("gpt2", 318)])
def test_a_model_loads_and_gives_a_finite_score_for_every_token(open_backend, name, vocab_size):
    backend = open_backend(name)
    scores = prefill(backend, some_ids(5))
    assert (backend.vocab_size, backend.context_length) == (vocab_size, CONTEXT_LENGTH)
    assert (scores.dtype, scores.shape) == (np.float32, (vocab_size,))
    assert np.isfinite(scores).all()
    assert scores.std() > 0.1


@st.composite
def chunkings(draw, tails):
    """A prompt's length and where it is cut: anywhere on the grid, and behind its last multiple anywhere if `tails`."""
    length = draw(st.integers(1, 5 * GRID))
    last = length // GRID * GRID
    cuts = draw(st.sets(st.sampled_from(range(GRID, last + 1, GRID)))) if last else set()
    if tails and length - last > 1:
        cuts |= draw(st.sets(st.integers(last + 1, length - 1))) | ({last} - {0})
    return length, sorted(cuts - {length})


@pytest.mark.parametrize(("name", "tails"), [("spm", True), ("falcon", True), ("gpt2", False)])
def test_chunks_on_the_grid_and_any_tail_give_the_same_bits(open_backend, name, tails):
    backend = open_backend(name)  # GGML's older types round differently in tails

    @settings(max_examples=40, deadline=None)
    @given(chunkings(tails))
    def check(chunking):
        length, cuts = chunking
        token_ids = some_ids(length)
        assert np.array_equal(prefill(backend, token_ids, cuts), prefill(backend, token_ids))

    check()


@pytest.mark.parametrize(
    ("chunk", "threads"), [(32, 1), (64, 1), (128, 1), (128, 2)]
)  # threads that spin are slow on busy cores
def test_neither_the_size_of_chunks_nor_the_number_of_threads_matters(open_backend, chunk, threads):
    backend, token_ids = open_backend("bpe"), some_ids(200)
    whole = prefill(backend, token_ids)
    assert np.array_equal(prefill(backend, token_ids, range(chunk, 200, chunk), threads), whole)


@pytest.mark.parametrize("name", ["spm", "falcon", "gpt2"])
def test_going_back_is_as_good_as_a_fresh_cache(open_backend, name):
    used, fresh = open_backend(name), open_backend(name)
    common, other = some_ids(GRID), some_ids(60, seed=1)
    prefill(used, [*common, *some_ids(150, seed=2)])
    used.forward(other, GRID, 1)
    assert np.array_equal(used.logits(), prefill(fresh, [*common, *other], [GRID]))


@pytest.mark.parametrize("name", ["spm", "gpt2"])
def test_the_context_can_be_filled_and_not_exceeded(open_backend, name):
    backend = open_backend(name)
    token_ids = some_ids(CONTEXT_LENGTH)
    whole = prefill(backend, token_ids)
    for position, count in ((CONTEXT_LENGTH, 1), (CONTEXT_LENGTH - 1, 2), (0, CONTEXT_LENGTH + 1), (2**31, 1)):
        with pytest.raises(RuntimeError, match=f"position {position + count} is beyond the context of {CONTEXT_LENGTH}"):
            backend.forward([5] * count, position, 1)
    assert np.array_equal(prefill(backend, token_ids), whole)


@pytest.mark.parametrize("name", ["spm", "falcon", "gpt2"])
def test_two_backends_of_one_file_do_not_disturb_each_other_in_two_threads(open_backend, name):
    alone = open_backend(name)
    prompts = [some_ids(40, seed=3), some_ids(70, seed=4)]
    expected = [decode(alone, prompt, 60) for prompt in prompts]
    backends, barrier = [open_backend(name) for _ in prompts], Barrier(2)

    def decode_together(backend, prompt):
        barrier.wait(10)
        return decode(backend, prompt, 60)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(decode_together, backends, prompts))
    assert np.array_equal(results, expected)


@pytest.mark.parametrize("text", TEXTS)
def test_text_of_any_script_is_tokenized_whole(open_backend, text):
    spm, gpt2 = open_backend("spm"), open_backend("gpt2")
    assert b"".join(map(spm.piece, spm.tokenize(text.encode()))) == b" " + text.encode()  # SentencePiece puts one in front
    assert b"".join(map(gpt2.piece, gpt2.tokenize(text.encode()))) == text.encode()


def test_what_a_token_reads_as_is_what_it_was_made_of(open_backend):
    assert open_backend("spm").piece(tiny_models.spm_vocabulary()[0].index("▁hello")) == b" hello"
    assert open_backend("spm").piece(3 + 0x0A) == b"\n"
    assert open_backend("gpt2").piece(317) == b"<|endoftext|>"


def test_closing_frees_the_model_and_may_be_repeated(tmp_path):
    path = tiny_models.write_llama_spm(tmp_path / "closing.gguf")
    first, second = CTransformersBackend(path, CONTEXT_LENGTH), CTransformersBackend(path, CONTEXT_LENGTH)
    expected = prefill(second, some_ids(5))
    first.close()
    first.close()
    assert is_mapped(path)  # by the second
    assert np.array_equal(prefill(second, some_ids(5)), expected)
    second.close()
    assert not is_mapped(path)
    with pytest.raises(RuntimeError, match="closed"):
        second.tokenize(b"hello")
    third = CTransformersBackend(path, CONTEXT_LENGTH)
    assert np.array_equal(prefill(third, some_ids(5)), expected)
    third.close()


def is_mapped(path):
    return str(path) in Path("/proc/self/maps").read_text()


def test_a_file_that_the_library_refuses_is_a_runtime_error(tmp_path):
    path = tiny_models.write_llama_spm(tmp_path / "other.gguf", keys={"general.architecture": "qwen2"})
    with pytest.raises(RuntimeError, match="refuses"):
        CTransformersBackend(path, CONTEXT_LENGTH)


@pytest.mark.slow
def test_a_pass_longer_than_the_librarys_buffers_is_cut(tmp_path):
    path = tiny_models.write_llama_spm(tmp_path / "long.gguf", keys={"llama.context_length": 4096})
    with closing(CTransformersBackend(path, 4096)) as backend:
        token_ids = some_ids(2560)
        assert np.array_equal(prefill(backend, token_ids), prefill(backend, token_ids, range(512, 2560, 512)))


def test_a_ggml_model_has_room_for_a_prompts_end_in_the_librarys_fixed_buffers(tmp_path):
    path = tiny_models.write_ggml(tmp_path / "deep.bin", "gpt2", context=1024, heads=64, layers=24)
    with closing(CTransformersBackend(path, 1024, "gpt2")) as backend:
        backend.forward([5] * 64, 0, 1)
        assert np.isfinite(backend.logits()).all()
        backend.forward([5] * 64, 1024 - 64, 1)  # the attention alone takes 400 MB; what it reads was never evaluated


def test_a_vocabulary_without_a_space_does_not_overflow_the_buffer(tmp_path):
    tokens = ["▁▁" if token == "▁" else token for token in tiny_models.spm_vocabulary()[0]]
    path = tiny_models.write_llama_spm(tmp_path / "spaceless.gguf", keys={"tokenizer.ggml.tokens": tokens})
    with closing(CTransformersBackend(path, CONTEXT_LENGTH)) as backend:
        assert len(backend.tokenize(b"\n \n " * 500)) == 3 + 1000 + 3 * 1000  # each space as the three bytes of "▁"


def test_one_slot_too_many_is_refused_and_not_the_end_of_the_process(open_backend):
    slots = [open_backend("spm") for _ in range(24)]
    with pytest.raises(RuntimeError, match="room for 24 slots, of all models together"):
        open_backend("spm")
    slots[0].close()
    assert np.isfinite(prefill(open_backend("spm"), some_ids(5))).all()
