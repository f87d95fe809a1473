"""From a file to an engine on llama.cpp."""

from contextlib import ExitStack, closing

import numpy as np
import pytest

from llmserve.config import ModelSpec, ServerConfig
from llmserve.engine.generation import Delta, Failed, GenerationParams, SamplingParams
from llmserve.engine.statistics import StatisticsCounter
from llmserve.errors import ModelFileError
from llmserve.models import probe
from llmserve.models.loading import Loader, choose_engine, has_llamacpp
from tests import tiny_models

needs_llamacpp = pytest.mark.skipif(not has_llamacpp(), reason="llama-cpp-python, the extra `llamacpp`, is not installed")
TIMEOUT = 20.0
QUESTION = "what is the poem about the river and the sea that the user runs to and stop " * 2


@pytest.fixture
def open_engine(tmp_path):
    loader = Loader(ServerConfig(cache_dir=str(tmp_path / "cache"), cores=2))
    with ExitStack() as opened:

        def open_engine(path, **options):
            prepared = loader.prepare(ModelSpec(**{"id": "tiny", "source": str(path), "slots": 4} | options))
            return opened.enter_context(closing(prepared.open(StatisticsCounter())))

        yield open_engine


def submit(engine, content, max_tokens=12):
    prompt_ids = engine.tokenizer.encode(engine.chat_template.render([{"role": "user", "content": content}]))
    return engine.submit(prompt_ids, GenerationParams(max_tokens, sampling=SamplingParams(temperature=0)))


def text_of(generation):
    events = list(generation.events(TIMEOUT))
    assert not isinstance(events[-1], Failed), events[-1]
    return "".join(event.text for event in events if isinstance(event, Delta))


@pytest.mark.parametrize(
    ("options", "llamacpp", "expected"),
    [
        ({}, True, "llamacpp"),
        ({}, False, "ctransformers"),
        ({"engine": "ctransformers"}, True, "ctransformers"),
        ({"engine": "llamacpp"}, True, "llamacpp"),
        ({"model_type": "gpt2"}, True, "ctransformers"),
    ],
)
def test_the_engine_is_the_one_asked_for_else_the_faster_one_that_is_there(options, llamacpp, expected):
    engine, reason = choose_engine(ModelSpec(id="m", source="m.gguf", **options), llamacpp)
    assert engine == expected
    assert reason


@needs_llamacpp
@pytest.mark.parametrize("task", ["generate", "embed"])
def test_a_model_says_when_it_runs_without_repacked_weights(tmp_path, open_engine, task):
    path = tiny_models.write_llama_spm(tmp_path / "tiny.gguf")
    probe.remember(probe.no_repack_note(tmp_path / "cache"))
    assert "without repacked weights" in open_engine(path, engine="llamacpp", task=task).info.reason
    assert "repacked" not in open_engine(path, engine="ctransformers", task=task).info.reason


@pytest.mark.parametrize(
    ("options", "llamacpp", "message"),
    [({}, False, r'pip install "llmserve\[llamacpp\]"'), ({"model_type": "gpt2"}, True, "reads GGUF files only")],
)
def test_an_engine_that_cannot_run_it_is_refused(options, llamacpp, message):
    with pytest.raises(ModelFileError, match=message):
        choose_engine(ModelSpec(id="m", source="m.gguf", engine="llamacpp", **options), llamacpp)


@needs_llamacpp
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma3"])
def test_a_modern_model_answers_the_same_alone_and_together(open_engine, tmp_path, architecture):
    engine = open_engine(tiny_models.write_modern(tmp_path / "model.gguf", architecture))
    questions = [f"{QUESTION} {number}" for number in range(6)]
    alone = [text_of(submit(engine, question)) for question in questions]
    together = [submit(engine, question) for question in questions]
    assert [text_of(generation) for generation in together] == alone
    assert engine.info.name == "llamacpp"


@needs_llamacpp
@pytest.mark.parametrize("write", [tiny_models.write_llama_spm, tiny_models.write_llama_bpe])
def test_both_libraries_make_the_same_prompt_of_a_text(open_engine, tmp_path, write):
    path = write(tmp_path / "model.gguf")
    engines = [open_engine(path, engine=name) for name in ("llamacpp", "ctransformers")]
    for content in ("hello river", "  two  spaces\n\n", "é 日本 </s> <|im_end|> <s>", "a" * 50):
        prompts = [e.tokenizer.encode(e.chat_template.render([{"role": "user", "content": content}])) for e in engines]
        assert prompts[0] == prompts[1]


@needs_llamacpp
def test_memory_is_the_file_and_a_cache_for_each_slot(open_engine, tmp_path):
    path = tiny_models.write_modern(tmp_path / "model.gguf", "qwen2")
    info = open_engine(path, slots=3, context_length=128).info
    per_token = 2 * tiny_models.NUM_LAYERS * 64 // tiny_models.NUM_HEADS * tiny_models.NUM_KV_HEADS * 2
    assert (info.weights_bytes, info.kv_cache_bytes) == (path.stat().st_size, 3 * 128 * per_token)
    assert (info.context_length, info.num_slots) == (128, 3)


@needs_llamacpp
@pytest.mark.parametrize("options", [{"kv_type": "f16", "flash_attention": "on"}, {"kv_type": "f32", "flash_attention": "off"}])
def test_settings_of_the_cache_are_taken(open_engine, tmp_path, options):
    path = tiny_models.write_llama_bpe(tmp_path / "model.gguf")
    assert text_of(submit(open_engine(path, **options), QUESTION))


@needs_llamacpp
def test_a_broken_file_is_refused_with_the_librarys_reason(open_engine, tmp_path):
    path = tiny_models.write_llama_bpe(tmp_path / "model.gguf", tensors={"output_norm.weight": None})
    with pytest.raises(ModelFileError, match="output_norm"):
        open_engine(path)


@needs_llamacpp
def test_scores_that_are_no_numbers_are_refused(open_engine, tmp_path):
    broken = {"output_norm.weight": np.full(64, np.nan, np.float32)}
    with pytest.raises(ModelFileError, match="not finite"):
        open_engine(tiny_models.write_llama_bpe(tmp_path / "model.gguf", tensors=broken))


@needs_llamacpp
def test_a_cache_that_the_library_cannot_make_is_refused_with_its_reason(open_engine, tmp_path):
    with pytest.raises(ModelFileError, match="K cache type q8_0 with block size 32 does not divide"):
        open_engine(tiny_models.write_llama_bpe(tmp_path / "model.gguf"), kv_type="q8_0")
