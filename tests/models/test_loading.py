from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest

from llmserve.config import ModelSpec, ServerConfig
from llmserve.engine.ctransformers_backend import CTransformersBackend
from llmserve.engine.generation import ChoiceEnd, Delta, FinishReason, GenerationParams, SamplingParams
from llmserve.engine.statistics import StatisticsCounter
from llmserve.errors import ModelFileError
from llmserve.models.loading import Loader
from tests import tiny_models
from tests.tiny_models import CHATML, CONTEXT_LENGTH, NUM_HEADS, NUM_KV_HEADS, NUM_LAYERS, Quantization

TIMEOUT = 20.0
PLAIN = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
QUESTION = "what is the poem about the river and the sea that the user runs to and stop " * 3
TRAINED = "model was trained for a context of 256 tokens; context_length = 257 is beyond it"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("loading")


@pytest.fixture(scope="module")
def options(folder):
    """The configuration of one tiny model of each kind, by name. Their files stay as they are, so each is probed once."""
    kinds = {
        "spm": tiny_models.write_llama_spm(folder / "spm.gguf"),
        "bpe": tiny_models.write_llama_bpe(folder / "bpe.gguf"),
        "falcon": tiny_models.write_falcon_bpe(folder / "falcon.gguf"),
    }
    ggml = {"source": str(tiny_models.write_ggml_gpt2(folder / "gpt2.bin")), "model_type": "gpt2", "chat_template": PLAIN}
    return {name: {"source": str(path)} for name, path in kinds.items()} | {"gpt2": ggml}


@pytest.fixture
def prepare(folder):
    loader = Loader(ServerConfig(cache_dir=str(folder / "cache"), cores=2))

    def prepare(source, **options):
        return loader.prepare(
            ModelSpec(**{"id": "tiny", "source": str(source), "slots": 2, "engine": "ctransformers"} | options)
        )

    return prepare


@pytest.fixture
def open_engine(prepare):
    """Prepare and open a model; all engines are closed after the test."""
    with ExitStack() as opened:
        yield lambda **options: opened.enter_context(closing(prepare(**options).open(StatisticsCounter())))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model"


def prompt_of(engine, content):
    return engine.tokenizer.encode(engine.chat_template.render([{"role": "user", "content": content}]))


def submit(engine, content, max_tokens=12):
    return engine.submit(prompt_of(engine, content), GenerationParams(max_tokens, sampling=SamplingParams(temperature=0)))


def text_of(generation):
    return "".join(event.text for event in generation.events(TIMEOUT) if isinstance(event, Delta))


def bare_answer(prepared, engine, content, num_tokens):
    """The text of a greedy loop on the library alone."""
    model = prepared.model
    backend = CTransformersBackend(model.path, model.info.context_length, model.spec.model_type)
    token_ids = prompt_of(engine, content)
    position = 0
    for _ in range(num_tokens):
        backend.forward(token_ids[position:], position, 1)
        position = len(token_ids)
        token_ids.append(int(np.argmax(backend.logits())))
    backend.close()
    return b"".join(map(engine.tokenizer.piece, token_ids[-num_tokens:])).decode(errors="replace")


@pytest.mark.parametrize("name", ["spm", "bpe", "falcon", "gpt2"])
def test_a_model_answers_a_chat_as_the_library_alone_would(prepare, open_engine, options, name):
    engine = open_engine(**options[name])
    generation = submit(engine, "hello world", max_tokens=20)
    *_, choice_end, end = generation.events(TIMEOUT)
    assert choice_end == ChoiceEnd(0, FinishReason.LENGTH, num_output_tokens=20)
    assert end.num_prompt_tokens == len(prompt_of(engine, "hello world"))
    assert text_of(generation) == bare_answer(prepare(**options[name]), engine, "hello world", 20) != ""


@pytest.mark.parametrize("model_type", sorted(tiny_models.GGML_LAYOUTS.keys() - {"gpt2"}))
def test_a_ggml_file_of_each_type_answers(open_engine, path, model_type):
    source = tiny_models.write_ggml(path, model_type)
    engine = open_engine(source=source, model_type=model_type, chat_template=PLAIN)
    assert b"".join(map(engine.tokenizer.piece, prompt_of(engine, "hello world"))) == b"hello world\n"
    assert text_of(submit(engine, "hello world")) == text_of(submit(engine, "hello world")) != ""


@pytest.mark.parametrize("name", ["spm", "bpe", "falcon", "gpt2"])
def test_the_same_prompt_again_is_taken_from_the_slot_that_holds_it(open_engine, options, name):
    engine = open_engine(**options[name], slots=2)
    first, again = ([*submit(engine, QUESTION).events(TIMEOUT)] for _ in range(2))
    assert again[:-1] == first[:-1]
    assert first[-1].num_cached_tokens == 0
    assert again[-1].num_cached_tokens >= again[-1].num_prompt_tokens // 32 * 32 > 0


@pytest.mark.parametrize("name", ["spm", "falcon", "gpt2"])
def test_answers_made_side_by_side_equal_those_made_one_by_one(open_engine, options, name):
    engine = open_engine(**options[name], slots=3)
    contents = [f"{word} {QUESTION[: 10 * number]}" for number, word in enumerate(tiny_models.WORDS[:9])]
    alone = [text_of(submit(engine, content)) for content in contents]
    together = [submit(engine, content) for content in contents]
    assert [text_of(generation) for generation in together] == alone
    assert len(set(alone)) > 3


def test_without_a_setting_the_context_is_the_models_own(open_engine, options):
    assert open_engine(**options["spm"]).context_length == CONTEXT_LENGTH


@pytest.mark.parametrize(("name", "num_kv_heads"), [("spm", NUM_KV_HEADS), ("bpe", NUM_KV_HEADS), ("falcon", 1)])
def test_memory_is_the_mapped_file_and_a_cache_for_each_slot(prepare, open_engine, options, name, num_kv_heads):
    kv_cache_bytes = 2 * NUM_LAYERS * CONTEXT_LENGTH * (64 // NUM_HEADS * num_kv_heads) * 2
    info = open_engine(**options[name], slots=3).info
    assert info.weights_bytes == Path(options[name]["source"]).stat().st_size
    assert (info.num_slots, info.kv_cache_bytes) == (3, 3 * kv_cache_bytes)
    assert prepare(**options[name], slots=3).memory_bytes == info.memory_bytes == info.weights_bytes + info.kv_cache_bytes


def test_slots_of_a_ggml_file_have_weights_of_their_own(open_engine, options):
    info = open_engine(**options["gpt2"], slots=3).info
    assert info.weights_bytes == 3 * Path(options["gpt2"]["source"]).stat().st_size
    assert info.kv_cache_bytes == 3 * 2 * NUM_LAYERS * CONTEXT_LENGTH * 64 * 4


def test_the_identity_changes_with_what_shapes_answers(open_engine, options):
    def identity(**changes):
        return open_engine(**options["spm"] | changes).info.identity

    same = {identity(), identity(slots=1), identity(max_waiting=1), identity(aliases=("other",))}
    assert len(same) == 1
    assert len({*same, identity(chat_template=CHATML), identity(context_length=128)}) == 3


def test_the_identity_changes_with_the_file(open_engine, path):
    before = open_engine(source=tiny_models.write_llama_spm(path, seed=1)).info.identity
    assert open_engine(source=tiny_models.write_llama_spm(path, seed=2)).info.identity != before


REASONS = {
    "missing": "does not exist",
    "empty": "is empty",
    "text": "is not a GGUF file: it begins with",
    "html": "is an HTML or XML page",
    "zip": "is a ZIP archive",
    "half": "is cut: its tensors end at byte .* fetch it again",
    "cut_header": "is damaged or cut",
    "architecture": "its architecture is 'qwen2'; a current llama.cpp may",
    "quantization": "is of the type IQ4_NL; a current llama.cpp may",
    **{f"flipped_{seed}": r"flipped_\d.gguf |is damaged|cannot run this model" for seed in range(6)},
}


def test_broken_files_are_refused_with_the_reason(prepare, tmp_path):
    good = tiny_models.write_llama_spm(tmp_path / "good.gguf")
    files = tiny_models.broken_files(tmp_path, good)
    assert files.keys() == REASONS.keys()
    for name, broken in files.items():
        with pytest.raises(ModelFileError, match=REASONS[name]):
            prepare(broken)


@pytest.mark.parametrize(
    ("write", "options", "reason"),
    [
        (lambda p: tiny_models.write_llama_spm(p, keys={"llama.rope.scaling.type": "yarn"}), {}, "rope scaling"),
        (lambda p: tiny_models.write_llama_spm(p, quantization=Quantization.BF16), {}, "is of the type BF16"),
        (lambda p: tiny_models.write_llama_spm(p, keys={"llama.attention.head_count_kv": [2, 2]}), {}, "from layer to layer"),
        (lambda p: tiny_models.write_llama_spm(p, keys={"llama.attention.head_count": 0}), {}, "a hyperparameter is 0"),
        (lambda p: tiny_models.write_llama_bpe(p, keys={"tokenizer.ggml.model": "t5"}), {}, "tokenizer is of the kind 't5'"),
        (tiny_models.write_llama_spm, {"context_length": 257}, TRAINED),
        (tiny_models.write_ggml_gpt2, {"context_length": 257, "model_type": "gpt2"}, TRAINED),
        (tiny_models.write_ggml_gpt2, {}, "is a GGML file, from before GGUF, which needs its model_type"),
        (tiny_models.write_llama_spm, {"model_type": "gpt2"}, "is not a GGML file, which model_type = 'gpt2' says it is"),
        (tiny_models.write_ggml_gpt2, {"model_type": "mpt"}, "or its model_type is not 'mpt'"),
        (tiny_models.write_ggml_gpt2, {"model_type": "llama"}, "model_type = 'llama' is not supported"),
    ],
)
def test_what_cannot_be_run_right_is_refused_with_the_reason(prepare, path, write, options, reason):
    with pytest.raises(ModelFileError, match=reason):
        prepare(write(path), **options)


@pytest.mark.parametrize(
    ("keys", "options", "reason"),
    [
        ({}, {"chat_template": "{% for %}"}, "The chat template has an error in line 1"),
        ({"tokenizer.ggml.pre": "brand-new"}, {}, "The model's pre-tokenizer 'brand-new' is not supported"),
    ],
)
def test_a_model_that_cannot_be_opened_leaves_nothing_behind(prepare, path, keys, options, reason):
    prepared = prepare(tiny_models.write_llama_bpe(path, keys=keys), **options)
    with pytest.raises(ModelFileError, match=reason):
        prepared.open(StatisticsCounter())
    assert str(prepared.model.path) not in Path("/proc/self/maps").read_text()


def test_a_prefill_chunk_beyond_the_librarys_buffers_is_cut(open_engine, path):
    source = tiny_models.write_llama_spm(path, keys={"llama.context_length": 4096})
    engine = open_engine(source=source, context_length=4096, prefill_chunk=4096)
    text_of(submit(engine, "hello"))  # an engine takes long chunks only once it knows its pace
    assert len(prompt_of(engine, QUESTION * 40)) > 2048
    assert text_of(submit(engine, QUESTION * 40, max_tokens=2))
