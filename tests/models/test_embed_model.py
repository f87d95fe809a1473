"""Vectors of tiny real models, on both libraries: as the file says, alike on both, and the same whatever else is asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llmserve.config import ModelSpec, ServerConfig
from llmserve.engine.generation import Embedding, GenerationEnd
from llmserve.engine.statistics import StatisticsCounter
from llmserve.errors import ModelFileError
from llmserve.models.loading import Loader, has_llamacpp
from tests.tiny_models import write_bert, write_falcon_bpe, write_llama_bpe, write_llama_spm

TEXTS = ["hello world", "the river runs to sea", "a", "stop stop stop"]
llamacpp = pytest.mark.skipif(not has_llamacpp(), reason="the extra `llamacpp` is not installed")
ENGINES = ["ctransformers", pytest.param("llamacpp", marks=llamacpp)]


@pytest.fixture
def open_model(tmp_path):
    engines = []

    def open_model(path, engine, **options):
        spec = ModelSpec(id="m", source=str(path), engine=engine, **options)
        engines.append(Loader(ServerConfig(cache_dir=str(tmp_path / "cache"))).prepare(spec).open(StatisticsCounter()))
        return engines[-1]

    yield open_model
    for engine in engines:
        engine.close()


def vectors(engine, texts):
    """One row each, of length 1."""
    encoded = engine.vectors.encode(texts)
    events = list(engine.embed(encoded).events(30))
    assert isinstance(events[-1], GenerationEnd)
    assert events[-1].num_prompt_tokens == sum(map(len, encoded))
    assert [event.choice for event in events[:-1]] == list(range(len(texts)))
    rows = np.array([np.frombuffer(event.vector, "<f4") for event in events if isinstance(event, Embedding)])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    return rows


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("write", [write_llama_spm, write_llama_bpe])
def test_a_texts_vector_does_not_depend_on_what_else_is_asked_for(open_model, tmp_path, engine, write):
    model = open_model(write(tmp_path / "m.gguf"), engine, task="embed")
    together = vectors(model, TEXTS)
    alone = np.concatenate([vectors(model, [text]) for text in reversed(TEXTS)])[::-1]
    np.testing.assert_array_equal(together, alone)
    assert np.abs(together @ together.T - np.eye(len(TEXTS))).max() < 0.999  # they are not all the same


@llamacpp
@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_both_libraries_give_the_same_vectors(open_model, tmp_path, pooling):
    path = write_llama_bpe(tmp_path / "m.gguf")
    ours, theirs = (
        vectors(open_model(path, engine, task="embed", pooling=pooling), TEXTS) for engine in ("ctransformers", "llamacpp")
    )
    np.testing.assert_allclose(ours, theirs, atol=2e-2)
    assert (ours * theirs).sum(axis=1).min() > 0.999


@llamacpp
def test_poolings_differ(open_model, tmp_path):
    path = write_llama_bpe(tmp_path / "m.gguf")
    rows = [
        vectors(open_model(path, "llamacpp", task="embed", pooling=pooling), TEXTS[1:2])[0]
        for pooling in ("last", "mean", "cls")
    ]
    assert np.abs(np.array(rows) @ np.array(rows).T - np.eye(3)).max() < 0.999


@llamacpp
def test_an_embedding_model_is_known_by_its_file(open_model, tmp_path):
    models = [open_model(write_bert(tmp_path / f"{pooling}.gguf", pooling=pooling), "auto") for pooling in (1, 2)]
    assert all(model.vectors.dimensions == 64 for model in models)
    (token_ids,) = models[0].vectors.encode(["hello world"])
    assert (token_ids[0], token_ids[-1]) == (2, 3)  # [CLS] and [SEP]
    mean, cls = (vectors(model, TEXTS) for model in models)
    assert np.abs(mean - cls).max() > 0.01
    np.testing.assert_array_equal(vectors(models[0], TEXTS[::-1]), mean[::-1])


@llamacpp
def test_a_long_text_has_a_vector_too(open_model, tmp_path):
    model = open_model(write_llama_bpe(tmp_path / "m.gguf"), "llamacpp", task="embed")
    assert vectors(model, ["the river " * 100]).shape == (1, 64)


def test_ctransformers_refuses_what_it_gives_no_vectors_of(open_model, tmp_path):
    for path in (write_falcon_bpe(tmp_path / "falcon.gguf"), write_bert(tmp_path / "bert.gguf")):
        with pytest.raises(ModelFileError, match=r"llama\.cpp"):
            open_model(path, "ctransformers", task="embed")


@llamacpp
def test_a_reranker_makes_no_vectors(open_model, tmp_path):
    with pytest.raises(ModelFileError, match="pooling type 4"):
        open_model(write_bert(tmp_path / "m.gguf", pooling=4), "llamacpp")


def test_a_model_makes_what_it_is_configured_to():
    from llmserve.engine.gguf import GGUFFile
    from llmserve.models.embed_model import choose_pooling, is_wanted

    def header(**metadata):
        return GGUFFile(3, metadata, {}, (), 32, 0, 0)

    spec = ModelSpec("m", "m.gguf")
    llama, bert = header(**{"general.architecture": "llama"}), header(**{"general.architecture": "bert"})
    qwen = header(**{"general.architecture": "qwen3", "qwen3.pooling_type": 3})
    assert [is_wanted(spec, each) for each in (llama, bert, qwen)] == [False, True, True]
    assert [choose_pooling(spec, each) for each in (llama, bert, qwen)] == ["last", "mean", "last"]
    assert [is_wanted(replace(spec, task=task), llama) for task in ("generate", "embed")] == [False, True]
    assert choose_pooling(replace(spec, pooling="mean"), qwen) == "mean"
