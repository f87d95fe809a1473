import os
import struct

import pytest

from llmserve.errors import ModelFileError
from llmserve.models import ggml
from tests.tiny_models import CONTEXT_LENGTH, GGML_LAYOUTS, NUM_LAYERS, write_ggml, write_llama_spm

DAMAGED = r"model\.bin is damaged or cut, or its model_type is not 'gpt2'\."


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.bin"


@pytest.mark.parametrize("model_type", GGML_LAYOUTS)
def test_the_facts_are_found_in_the_order_of_each_type(path, model_type):
    file = ggml.read(write_ggml(path, model_type), model_type)
    assert file.size == path.stat().st_size
    assert file.context_length == CONTEXT_LENGTH
    value_size = 4 if model_type in ("gpt2", "starcoder") else 2
    num_positions = 100 if model_type == "mpt" else CONTEXT_LENGTH
    assert file.kv_cache_bytes(context_length=100) == 2 * NUM_LAYERS * num_positions * 64 * value_size


@pytest.mark.parametrize("model_type", GGML_LAYOUTS)
def test_a_cut_file_is_refused_wherever_it_is_cut(path, model_type):
    size = write_ggml(path, model_type).stat().st_size
    for end in [*range(size - 1, 100, -size // 50), 30, 4]:
        os.truncate(path, end)
        with pytest.raises(ModelFileError, match=r"model\.bin is damaged or cut"):
            ggml.read(path, model_type)


@pytest.mark.parametrize("model_type", sorted(GGML_LAYOUTS.keys() - {"gpt2", "starcoder"}))
def test_a_file_of_another_type_is_refused(path, model_type):
    with pytest.raises(ModelFileError, match=DAMAGED):
        ggml.read(write_ggml(path, model_type), "gpt2")


def gpt2_head(vocab_size=1, context=8, width=8, heads=1, layers=1):
    return struct.pack("<4s7i", b"lmgg", vocab_size, context, width, heads, layers, 0, vocab_size)


@pytest.mark.parametrize(
    "content",
    [
        gpt2_head(vocab_size=2**31 - 1),
        gpt2_head(vocab_size=-1),
        gpt2_head(context=0),
        gpt2_head() + struct.pack("<I", 2**32 - 1),
        gpt2_head() + struct.pack("<I", 0) + struct.pack("<3i", 3, 0, 0) + bytes(12),
        gpt2_head() + struct.pack("<I", 0) + struct.pack("<3i", 2, 0, 99) + bytes(8),
        gpt2_head() + struct.pack("<I", 0) + struct.pack("<5i", 2, 0, 0, 2**31 - 1, 2**31 - 1),
        gpt2_head() + struct.pack("<I", 0) + struct.pack("<5i", 2, 0, 0, -(2**31), 2**31 - 1),
        gpt2_head() + struct.pack("<I", 0) + struct.pack("<3i", 1, -(2**31), 0) + bytes(4),
    ],
)
def test_absurd_numbers_are_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=DAMAGED):
        ggml.read(path, "gpt2")


def test_other_formats_are_told_apart_from_damage(path):
    with pytest.raises(ModelFileError, match=r"model\.bin is not a GGML file, which model_type = 'gpt2' says it is"):
        ggml.read(write_llama_spm(path), "gpt2")


def test_an_unknown_type_is_answered_with_the_known_ones(path):
    with pytest.raises(ModelFileError, match=r"model_type = 'bloom' is not supported; it can be gpt2, gptj, .*replit"):
        ggml.read(write_ggml(path, "gpt2"), "bloom")


def test_a_file_that_cannot_be_read_is_refused(path):
    with pytest.raises(ModelFileError, match=r"model\.bin cannot be read: No such file"):
        ggml.read(path, "gpt2")
