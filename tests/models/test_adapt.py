import json
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from gguf import GGUFReader

from llmserve.engine import gguf
from llmserve.errors import ModelFileError
from llmserve.models import adapt
from llmserve.models.adapt import Adaptation
from tests import tiny_models
from tests.tiny_models import NUM_HEADS, Quantization, write_falcon_bpe, write_ggml_gpt2, write_llama_bpe, write_llama_spm

CONTEXT_LENGTH = 128
TOKENS, SCORES, TYPES = tiny_models.spm_vocabulary()
MATRIX = "blk.0.ffn_up.weight"
F16_NORM = {"blk.0.attn_norm.weight": np.ones(64, np.float16)}
QUANTIZATIONS = ["F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def planned(path):
    return adapt.plan(gguf.read(path), CONTEXT_LENGTH)


def is_refused(path):
    try:
        planned(path)
    except ModelFileError:
        return True
    return False


def adapted(path, cache_dir):
    header = gguf.read(path)
    return adapt.adapt(path, header, adapt.plan(header, CONTEXT_LENGTH), cache_dir)


def copies(cache_dir):
    return [path for path in cache_dir.rglob("*") if path.is_file() and path.name != ".lock"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


# The decision


def test_a_file_that_the_library_runs_as_it_is_needs_nothing(path):
    assert planned(write_llama_spm(path)) == Adaptation()


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_quantizations_of_2023_need_nothing(path, name):
    assert planned(write_llama_spm(path, quantization=Quantization[name])) == Adaptation()


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda path: write_llama_spm(path, tensors={"output.weight": None}), Adaptation(add_output=True)),
        (lambda path: write_llama_bpe(path, tied=False), Adaptation(replace_tokenizer=True)),
        (lambda path: write_llama_bpe(path), Adaptation(add_output=True, replace_tokenizer=True)),
        (lambda path: write_falcon_bpe(path), Adaptation(replace_tokenizer=True)),
        (lambda path: write_falcon_bpe(path, two_norms=True), Adaptation(replace_tokenizer=True)),
    ],
)
def test_what_the_library_lacks_is_what_is_changed(path, write, expected):
    assert planned(write(path)) == expected


@pytest.mark.parametrize(
    "keys",
    [
        {"llama.vocab_size": len(TOKENS)},
        {"llama.attention.key_length": 16, "llama.attention.value_length": 16},
        {"llama.attention.sliding_window": CONTEXT_LENGTH},
        {"llama.attention.causal": True},
        {"llama.expert_count": 0},
        {"llama.rope.freq_base": 500000.0},
        {"llama.rope.scale_linear": 2.0},
        {"llama.rope.scaling.type": "none"},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0},
        {"tokenizer.ggml.padding_token_id": 2**32 - 1},
    ],
)
def test_hyperparameters_that_change_nothing_or_are_known_to_the_library_pass(path, keys):
    assert planned(write_llama_spm(path, keys=keys)) == Adaptation()


def test_without_a_number_of_kv_heads_there_are_as_many_as_heads(path):
    square = {f"blk.{i}.attn_{name}.weight": np.ones((64, 64), np.float32) for i in range(2) for name in "kv"}
    assert planned(write_llama_spm(path, keys={"llama.attention.head_count_kv": None}, tensors=square)) == Adaptation()


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"general.architecture": "qwen2"}, "its architecture is 'qwen2'"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, r"rope scaling \('linear', factor 4.0\)"),
        ({"llama.rope.scaling.factor": 4.0}, r"rope scaling \(None, factor 4.0\)"),
        ({"llama.rope.scaling.type": "yarn"}, r"rope scaling \('yarn', factor None\)"),
        ({"llama.attention.sliding_window": 127}, "sliding window of 127 tokens is shorter than the context of 128"),
        ({"llama.attention.key_length": 32}, "attention.key_length is 32, and embedding_length / head_count is 16"),
        ({"llama.attention.value_length": 32}, "attention.value_length is 32"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count is 8"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.attention.causal": False}, "not causal"),
        ({"llama.attention.scale": 0.1}, "it has the hyperparameter 'llama.attention.scale'"),
        ({"llama.feed_forward_length": [128, 128]}, "its llama.feed_forward_length differs from layer to layer"),
        ({"tokenizer.ggml.model": "t5"}, "its tokenizer is of the kind 't5'"),
        ({"tokenizer.ggml.tokens": ["x" if token == "<0xE2>" else token for token in TOKENS]}, "no token for the byte <0xE2>"),
    ],
)
def test_what_the_library_would_get_wrong_is_refused_with_the_advice_to_use_another(path, keys, reason):
    with pytest.raises(
        ModelFileError, match=f"ctransformers cannot run this model right: .*{reason}.*; a current llama.cpp may."
    ):
        planned(write_llama_spm(path, keys=keys))


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"rope_freqs.weight": np.ones(8, np.float32)}, "it has the tensor 'rope_freqs.weight'"),
        ({"blk.0.attn_q.bias": np.ones(64, np.float32)}, "it has the tensor 'blk.0.attn_q.bias'"),
        (F16_NORM, "its tensor blk.0.attn_norm.weight is of the type F16"),
        ({"blk.0.ffn_gate_exps.weight": np.ones((64, 64), np.float32)}, "it has the tensor 'blk.0.ffn_gate_exps.weight'"),
    ],
)
def test_tensors_that_the_library_cannot_use_are_refused(path, tensors, reason):
    with pytest.raises(ModelFileError, match=reason):
        planned(write_llama_spm(path, tensors=tensors))


@pytest.mark.parametrize("name", ["BF16", "IQ4_NL", "IQ4_XS"])
def test_newer_quantizations_are_refused(path, name):
    with pytest.raises(ModelFileError, match=f"its tensor token_embd.weight is of the type {name}"):
        planned(write_llama_spm(path, quantization=Quantization[name]))


@pytest.mark.parametrize(
    ("keys", "tensors", "reason"),
    [
        ({"split.count": 3}, {}, "one of 3 parts"),
        ({"llama.block_count": None}, {}, "llama.block_count is missing"),
        ({"llama.block_count": 2.0}, {}, "llama.block_count is of the type FLOAT32"),
        ({"llama.block_count": 0}, {}, "a hyperparameter is 0"),
        ({"llama.block_count": 3}, {}, "the tensor blk.2.attn_norm.weight is missing"),
        ({"llama.block_count": 2**31}, {}, "tensors for 2147483648 layers"),
        ({"llama.attention.head_count": 5}, {}, "width of 64 cannot be divided over 5 heads"),
        ({"llama.attention.head_count_kv": 2 * NUM_HEADS}, {}, "cannot be divided over 4 heads and 8 KV heads"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, {}, "layer_norm_rms_epsilon is missing"),
        ({"tokenizer.ggml.model": None}, {}, "tokenizer.ggml.model is missing"),
        ({"tokenizer.ggml.tokens": None}, {}, "tokenizer.ggml.tokens is missing"),
        ({"tokenizer.ggml.tokens": [1] * len(TOKENS)}, {}, "tokenizer.ggml.tokens is missing or of the wrong type"),
        ({"tokenizer.ggml.tokens": TOKENS[:-1]}, {}, r"token_embd.weight has the shape \(64, 415\), .* asks for \(64, 414\)"),
        ({"tokenizer.ggml.scores": None}, {}, "tokenizer.ggml.scores is missing"),
        ({"tokenizer.ggml.scores": SCORES[:9]}, {}, "scores has 9 values for 415 tokens"),
        ({"tokenizer.ggml.token_type": None}, {}, "tokenizer.ggml.token_type is missing"),
        ({"tokenizer.ggml.bos_token_id": 9999}, {}, "bos_token_id is 9999, and the vocabulary has 415 tokens"),
        ({"tokenizer.ggml.eos_token_id": 2.0}, {}, "'tokenizer.ggml.eos_token_id' is of the wrong type"),
        ({}, {MATRIX: None}, f"the tensor {MATRIX} is missing"),
        (
            {},
            {MATRIX: np.ones((64, 64), np.float32)},
            rf"the tensor {MATRIX} has the shape \(64, 64\), .* asks for \(64, 128\)",
        ),
    ],
)
def test_a_file_that_does_not_fit_together_is_refused(path, keys, tensors, reason):
    with pytest.raises(ModelFileError, match=reason):
        planned(write_llama_spm(path, keys=keys, tensors=tensors))


def test_no_broken_file_gets_through(tmp_path):
    good = write_llama_spm(tmp_path / "good.gguf")
    assert [name for name, broken in tiny_models.broken_files(tmp_path, good).items() if not is_refused(broken)] == []


# The copy


def test_a_file_that_needs_nothing_is_loaded_where_it_is(path, cache_dir):
    assert adapted(write_llama_spm(path), cache_dir) == path
    assert not cache_dir.exists()


def test_the_copy_has_the_data_of_the_source_and_an_output_that_costs_nothing(path, cache_dir):
    source = gguf.read(write_llama_bpe(path))
    before = path.read_bytes()
    copy_path = adapted(path, cache_dir)
    copy = gguf.read(copy_path)
    assert copy_path.read_bytes()[copy.data_offset :] == before[source.data_offset :]
    assert copy.tensors[:-1] == source.tensors
    by_name = {tensor.name: tensor for tensor in copy.tensors}
    assert by_name["output.weight"].offset == by_name["token_embd.weight"].offset
    assert path.read_bytes() == before


def test_the_copy_keeps_all_but_the_tokenizer_and_of_that_the_special_ids(path, cache_dir):
    source = gguf.read(write_llama_bpe(path, keys={"tokenizer.ggml.bos_token_id": 7}))
    copy = gguf.read(adapted(path, cache_dir))
    rest = {key: value for key, value in source.metadata.items() if not key.startswith("tokenizer.")}
    assert {key: value for key, value in copy.metadata.items() if not key.startswith("tokenizer.")} == rest
    assert copy.metadata["tokenizer.ggml.bos_token_id"] == 7
    assert copy.metadata["tokenizer.ggml.model"] == "llama"
    tokens = copy.metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == len(source.metadata["tokenizer.ggml.tokens"])
    assert "<0x0A>" in tokens


def test_a_copy_is_made_once(path, cache_dir):
    copy = adapted(write_llama_bpe(path), cache_dir)
    made = copy.stat()
    assert adapted(path, cache_dir) == copy
    assert copy.stat() == made


def test_a_changed_source_gets_a_new_copy_and_loses_the_old_one(path, cache_dir):
    old = adapted(write_llama_bpe(path, seed=1), cache_dir)
    other = adapted(write_llama_bpe(path.with_name("other.gguf")), cache_dir)
    new = adapted(write_llama_bpe(path, seed=2), cache_dir)
    assert new != old
    assert sorted(copies(cache_dir)) == sorted([new, other])


def test_threads_that_adapt_one_file_get_one_copy(path, cache_dir):
    write_llama_bpe(path)
    with ThreadPoolExecutor(4) as pool:
        results = set(pool.map(lambda _: adapted(path, cache_dir), range(8)))
    assert copies(cache_dir) == list(results)


def test_a_full_disk_is_told_and_nothing_is_left(path, cache_dir):
    write_llama_bpe(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ModelFileError, match=r"model.gguf cannot be adapted for ctransformers: File too large\."):
            adapted(path, cache_dir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert copies(cache_dir) == []


def test_a_source_that_is_no_longer_what_its_header_says_is_refused(path, cache_dir):
    header = gguf.read(write_llama_bpe(path))
    os.truncate(path, header.size - 32)
    with pytest.raises(ModelFileError, match="was changed while it was read"):
        adapt.adapt(path, header, Adaptation(add_output=True), cache_dir)
    assert copies(cache_dir) == []


# The library itself, in a process of its own, for it may die

EVALUATE = """
import json, sys
import numpy as np
from pathlib import Path
from llmserve.engine.ctransformers_backend import CTransformersBackend

PROMPTS = [[300, 5, 260], [280, 281, 282, 283]]

def greedy(model, prompt):
    ids = list(prompt)
    model.forward(ids, 0, threads=1)
    first = model.logits().tolist()
    for _ in range(8):
        ids.append(int(np.argmax(model.logits())))
        model.forward(ids[-1:], len(ids) - 1, threads=1)
    return first, ids

for path, model_type, text in json.loads(sys.argv[1]):
    model = CTransformersBackend(Path(path), 128, model_type)
    if text:
        model.tokenize(text.encode())
    print(json.dumps([greedy(model, prompt) for prompt in PROMPTS + PROMPTS]))
"""


def start(*paths, model_type="", text=""):
    arguments = json.dumps([(str(path), model_type, text) for path in paths])
    return subprocess.run([sys.executable, "-c", EVALUATE, arguments], capture_output=True, text=True, check=False)


def evaluate(*paths, **options):
    """For each file: the logits after a prompt and the greedy ids, for two prompts and the same two again."""
    child = start(*paths, **options)
    assert child.returncode == 0, child.stderr
    return [json.loads(line) for line in child.stdout.splitlines()]


def assert_sane(results):
    for first, second, first_again, second_again in results:
        assert np.isfinite(first[0]).all()
        assert np.isfinite(second[0]).all()
        assert np.abs(np.subtract(first[0], second[0])).max() > 0.1
        assert (first, second) == (first_again, second_again)


def test_the_library_runs_what_is_planned_and_adapted(tmp_path, cache_dir):
    files = [
        write_llama_spm(tmp_path / "spm.gguf"),
        write_llama_spm(tmp_path / "spm-tied.gguf", tensors={"output.weight": None}),
        write_llama_bpe(tmp_path / "bpe.gguf"),
        write_llama_bpe(tmp_path / "bpe-untied.gguf", tied=False),
        write_falcon_bpe(tmp_path / "falcon-7b.gguf"),
        write_falcon_bpe(tmp_path / "falcon-40b.gguf", two_norms=True),
        *(write_llama_bpe(tmp_path / f"{name}.gguf", quantization=Quantization[name]) for name in QUANTIZATIONS),
    ]
    assert all(file.stat().st_size < 2_000_000 for file in files)
    assert_sane(evaluate(*(adapted(file, cache_dir) for file in files)))


def test_the_library_runs_ggml_files_of_gpt2(tmp_path):
    path = write_ggml_gpt2(tmp_path / "gpt2.bin")
    assert path.stat().st_size < 2_000_000
    assert_sane(evaluate(path, model_type="gpt2", text="hello world"))


def test_an_output_that_shares_the_embeddings_range_is_as_good_as_a_copy(tmp_path, cache_dir):
    tied = write_llama_bpe(tmp_path / "tied.gguf")
    embedding = next(t.data for t in GGUFReader(tied).tensors if t.name == "token_embd.weight")
    untied = write_llama_bpe(tmp_path / "untied.gguf", tied=False, tensors={"output.weight": embedding})
    first, second = evaluate(adapted(tied, cache_dir), adapted(untied, cache_dir))
    assert first == second


def test_the_library_ignores_what_is_refused_as_ignored(tmp_path):
    plain = write_llama_spm(tmp_path / "plain.gguf")
    ignored = {
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
        "llama.attention.sliding_window": 2,
        "llama.attention.key_length": 32,
        "llama.attention.scale": 0.1,
    }
    strange = write_llama_spm(tmp_path / "strange.gguf", keys=ignored)
    heard = write_llama_spm(tmp_path / "heard.gguf", keys={"llama.rope.scale_linear": 4.0})
    results = evaluate(plain, strange, heard)
    assert results[0] == results[1]
    assert results[0] != results[2]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"keys": {"llama.attention.head_count_kv": 2 * NUM_HEADS}}, ""),
        ({"keys": {"tokenizer.ggml.tokens": [1] * len(TOKENS)}}, ""),
        ({"keys": {"tokenizer.ggml.tokens": ["x" if token == "<0xE2>" else token for token in TOKENS]}}, "€"),
        ({"tensors": F16_NORM}, ""),
    ],
)
def test_the_library_dies_of_what_is_refused(path, changes, text):
    assert is_refused(write_llama_spm(path, **changes))
    assert start(path, text=text).returncode < 0
