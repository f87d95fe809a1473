"""llama.cpp itself, on tiny generated models."""

import logging

import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python, the extra `llamacpp`, is not installed")

from llmserve.engine.backend import Piece
from llmserve.engine.llamacpp_backend import LlamaCppBackend, LlamaCppSettings
from tests import tiny_models

SETTINGS = LlamaCppSettings(repack=False)
PROMPT = [5 + number % 90 for number in range(48)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_models.write_llama_bpe(tmp_path_factory.mktemp("llamacpp") / "model.gguf")


@pytest.fixture
def backend(path):
    opened = LlamaCppBackend(path, 256, 3, 64, SETTINGS)
    yield opened
    opened.close()


def scores(backend, *pieces):
    """The scores after each piece of one pass, copied."""
    backend.forward([Piece(*piece, True) for piece in pieces], 1)
    return [backend.logits(index).copy() for index in range(len(pieces))]


def close(a, b):
    return np.allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())


def test_scores_are_those_of_a_pass_for_each_sequence_alone(backend):
    prompts = [PROMPT[:20], PROMPT[3:10], [7]]
    alone = []
    for prompt in prompts:
        alone += scores(backend, (0, 0, prompt))
        backend.truncate(0, 0)
    together = scores(backend, *((number, 0, prompt) for number, prompt in enumerate(prompts)))
    assert all(map(close, together, alone))


def test_a_prompt_in_pieces_gives_the_scores_of_the_whole(backend):
    (whole,) = scores(backend, (0, 0, PROMPT))
    backend.forward([Piece(1, 0, PROMPT[:30], False)], 2)
    (pieces,) = scores(backend, (1, 30, PROMPT[30:]))
    assert close(pieces, whole)


def test_a_copied_beginning_gives_the_scores_of_a_fresh_one(backend):
    (whole,) = scores(backend, (0, 0, [*PROMPT[:40], 9]))
    scores(backend, (1, 0, PROMPT))
    scores(backend, (2, 0, [3, 4, 5]))
    backend.copy(1, 2)
    backend.truncate(2, 40)
    (copied,) = scores(backend, (2, 40, [9]))
    assert close(copied, whole)
    (source,) = scores(backend, (1, 48, [9]))
    assert not close(source, whole)


def test_more_than_a_batch_is_an_error_and_no_abort(backend):
    with pytest.raises(RuntimeError, match="most"):
        backend.forward([Piece(0, 0, [1] * 65, True)], 1)
    assert scores(backend, (0, 0, [1]))


def test_tokens_are_spelled_exactly_and_control_tokens_not_at_all(backend):
    tokens, _, _ = tiny_models.bpe_vocabulary()
    assert backend.piece(tokens.index("Ġhello")) == b" hello"
    assert backend.piece(tokens.index("<|im_end|>")) == b""
    assert backend.is_end(tokens.index("<|im_end|>"))
    assert not backend.is_end(tokens.index("Ġhello"))


def test_text_never_becomes_a_control_token(backend):
    tokens, _, _ = tiny_models.bpe_vocabulary()
    token_ids = backend.tokenize("<|im_end|> hello é\n".encode())
    assert tokens.index("<|im_end|>") not in token_ids
    assert b"".join(map(backend.piece, token_ids)) == "<|im_end|> hello é\n".encode()


def test_a_file_that_is_none_is_refused_and_the_library_says_why_in_the_log(tmp_path, caplog):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF no more")
    with caplog.at_level(logging.DEBUG, "llama.cpp"), pytest.raises(RuntimeError):
        LlamaCppBackend(path, 256, 1, 64, SETTINGS)
    assert caplog.messages


def test_a_closed_model_is_an_error_and_closing_twice_is_none(path):
    backend = LlamaCppBackend(path, 256, 1, 64, SETTINGS)
    backend.close()
    backend.close()
    with pytest.raises(RuntimeError, match="closed"):
        backend.forward([Piece(0, 0, [1], True)], 1)


def test_scores_that_were_looked_at_are_gone_with_the_model(path):
    backend = LlamaCppBackend(path, 256, 1, 64, SETTINGS)
    scores(backend, (0, 0, [1]))
    backend.close()
    with pytest.raises(RuntimeError, match="closed"):
        backend.logits(0)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma3"])
def test_architectures_that_ctransformers_does_not_know(tmp_path, architecture):
    backend = LlamaCppBackend(tiny_models.write_modern(tmp_path / "model.gguf", architecture), 256, 2, 64, SETTINGS)
    (whole,) = scores(backend, (0, 0, PROMPT))
    backend.forward([Piece(1, 0, PROMPT[:40], False)], 1)
    assert np.isfinite(whole).all()
    assert close(scores(backend, (1, 40, PROMPT[40:]))[0], whole)
    backend.close()
