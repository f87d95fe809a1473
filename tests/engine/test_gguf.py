import os
import struct
import time
from dataclasses import replace

import gguf as reference
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.engine import gguf
from llmserve.engine.gguf import GGUFFile, ValueType
from llmserve.errors import ModelFileError
from tests import tiny_models

U64_MAX = 2**64 - 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.write_llama_bpe(tmp_path_factory.mktemp("gguf") / "model.gguf")


def write(path, *parts, num_tensors=0, num_keys=0, version=3):
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", version, num_tensors, num_keys) + b"".join(parts))
    return path


def string(text):
    return struct.pack("<Q", len(text)) + text


def array(element_type, count, payload=b""):
    return string(b"key") + struct.pack("<IIQ", ValueType.ARRAY, element_type, count) + payload


def tensor(name, shape, type_id=0, offset=0):
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type_id, offset)


def test_metadata_is_what_the_writer_was_given(model):
    header = gguf.read(model)
    tokens, merges, types = tiny_models.bpe_vocabulary()
    assert header.version == 3
    assert header.metadata["general.architecture"] == "llama"
    assert header.metadata["llama.rope.freq_base"] == 10000.0
    assert header.metadata["tokenizer.ggml.add_bos_token"] is False
    assert header.metadata["tokenizer.ggml.tokens"] == tuple(tokens)
    assert header.metadata["tokenizer.ggml.merges"] == tuple(merges)
    assert header.metadata["tokenizer.ggml.token_type"] == tuple(types)
    assert header.types["llama.block_count"] is ValueType.UINT32
    assert header.types["tokenizer.ggml.token_type"] is ValueType.INT32


def test_the_directory_says_what_the_reference_reader_says(model):
    header = gguf.read(model)
    expected = reference.GGUFReader(model)
    assert header.data_offset == expected.data_offset
    assert header.size == model.stat().st_size
    assert [(t.name, t.shape, t.type.name, header.data_offset + t.offset, t.num_bytes) for t in header.tensors] == [
        (t.name, tuple(t.shape), t.tensor_type.name, t.data_offset, t.n_bytes) for t in expected.tensors
    ]


def test_every_tensor_type_has_ggmls_block_sizes():
    ours = {(t.id, t.name, t.block_size, t.block_bytes) for t in gguf.TENSOR_TYPES.values()}
    assert ours == {(t.value, t.name, *sizes) for t, sizes in reference.GGML_QUANT_SIZES.items()}


@pytest.mark.parametrize("version", [2, 3])
def test_a_header_is_packed_into_the_bytes_it_was_read_from(model, tmp_path, version):
    data = bytearray(model.read_bytes())
    data[4] = version
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    header = gguf.read(path)
    assert header.version == version
    assert gguf.pack_header(header) == data[: header.data_offset]


def test_bytes_that_are_not_utf8_survive_a_round_trip(tmp_path):
    path = write(tmp_path / "model.gguf", array(ValueType.STRING, 2, string(b"\xff\xfe") + string("é".encode())), num_keys=1)
    header = gguf.read(path)
    assert header.metadata["key"] == ("\udcff\udcfe", "é")
    assert gguf.pack_header(header).startswith(path.read_bytes())


_VALUES = {
    ValueType.UINT8: st.integers(0, 2**8 - 1),
    ValueType.INT8: st.integers(-(2**7), 2**7 - 1),
    ValueType.UINT16: st.integers(0, 2**16 - 1),
    ValueType.INT16: st.integers(-(2**15), 2**15 - 1),
    ValueType.UINT32: st.integers(0, 2**32 - 1),
    ValueType.INT32: st.integers(-(2**31), 2**31 - 1),
    ValueType.FLOAT32: st.floats(width=32, allow_nan=False),
    ValueType.BOOL: st.booleans(),
    ValueType.STRING: st.text(),
    ValueType.UINT64: st.integers(0, U64_MAX),
    ValueType.INT64: st.integers(-(2**63), 2**63 - 1),
    ValueType.FLOAT64: st.floats(allow_nan=False),
}
_typed_values = st.sampled_from(list(_VALUES)).flatmap(
    lambda kind: st.tuples(st.just(kind), _VALUES[kind] | st.lists(_VALUES[kind]).map(tuple))
)


@settings(max_examples=50, deadline=None)
@given(entries=st.dictionaries(st.text().filter(lambda key: key != "general.alignment"), _typed_values))
def test_any_metadata_survives_a_round_trip(tmp_path_factory, entries):
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    types = {key: kind for key, (kind, _) in entries.items()}
    metadata = {key: value for key, (_, value) in entries.items()}
    made = GGUFFile(3, metadata, types, (), 32, 0, 0)
    packed = gguf.pack_header(made)
    path.write_bytes(packed)
    assert gguf.read(path) == replace(made, data_offset=len(packed), size=len(packed))


def test_the_data_begins_at_the_alignment_that_the_file_names(tmp_path):
    made = GGUFFile(3, {"general.alignment": 128}, {"general.alignment": ValueType.UINT32}, (), 128, 0, 0)
    path = tmp_path / "aligned.gguf"
    path.write_bytes(gguf.pack_header(made))
    assert gguf.read(path) == replace(made, data_offset=128, size=128)


def test_a_header_longer_than_the_first_read_is_read_whole(tmp_path):
    texts = tuple(f"{i:0100d}" for i in range(gguf.FIRST_READ_SIZE // 100))
    made = GGUFFile(3, {"key": texts}, {"key": ValueType.STRING}, (), 32, 0, 0)
    path = tmp_path / "long.gguf"
    path.write_bytes(gguf.pack_header(made))
    assert gguf.read(path).metadata["key"] == texts


def test_a_vocabulary_of_50_000_tokens_is_read_in_100_ms(tmp_path):
    texts = tuple(f"token {i}" for i in range(50_000))
    metadata = {"tokens": texts, "merges": texts, "types": (1,) * 50_000}
    types = {"tokens": ValueType.STRING, "merges": ValueType.STRING, "types": ValueType.INT32}
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(gguf.pack_header(GGUFFile(3, metadata, types, (), 32, 0, 0)))

    def seconds():
        start = time.process_time()
        gguf.read(path)
        return time.process_time() - start

    assert min(seconds() for _ in range(5)) < 0.1


def test_get_gives_none_for_a_missing_key_and_refuses_another_type(model):
    header = gguf.read(model)
    assert header.get("llama.block_count", int) == tiny_models.NUM_LAYERS
    assert header.get("no.such.key", int) is None
    with pytest.raises(ModelFileError, match=r"'tokenizer.ggml.add_bos_token' is of the wrong type: int"):
        header.get("tokenizer.ggml.add_bos_token", int)


BROKEN = {
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "text": (lambda path: path.write_bytes(b"This is no model.\n" * 9), r"begins with b'This is '"),
    "html": (lambda path: path.write_bytes(b"\n <!doctype html><html></html>"), "is an HTML or XML page"),
    "zip": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(99)), "is a ZIP archive"),
    "ggml": (lambda path: tiny_models.write_ggml_gpt2(path), "is a GGML file, .* needs its model_type"),
    "lfs_pointer": (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
    "magic_only": (lambda path: path.write_bytes(b"GGUF"), "header goes on to byte 24, but the file has 4 bytes"),
    "version_1": (lambda path: write(path, version=1), "has GGUF version 1; versions 2 and 3"),
    "version_4": (lambda path: write(path, version=4), "has GGUF version 4"),
    "big_endian": (lambda path: write(path, version=3 << 24), "big-endian"),
    "2^64_keys": (lambda path: write(path, num_keys=U64_MAX), "header goes on to byte .* but the file has 24 bytes"),
    "2^64_tensors": (lambda path: write(path, num_tensors=U64_MAX), "header goes on to byte"),
    "2^64_numbers": (lambda path: write(path, array(ValueType.UINT8, U64_MAX), num_keys=1), "header goes on to byte"),
    "2^64_strings": (lambda path: write(path, array(ValueType.STRING, U64_MAX), num_keys=1), "header goes on to byte"),
    "string_beyond_end": (
        lambda path: write(path, array(ValueType.STRING, 1, struct.pack("<Q", 10**18)), num_keys=1),
        "header goes on to byte 1000000000000000059, but the file has 59 bytes",
    ),
    "fewer_strings": (
        lambda path: write(path, array(ValueType.STRING, 2, string(b"x" * 12)), num_keys=1),
        "header goes on to byte",
    ),
    "unknown_value_type": (lambda path: write(path, string(b"k"), struct.pack("<IQ", 13, 0), num_keys=1), "unknown type 13"),
    "nested_array": (lambda path: write(path, array(ValueType.ARRAY, 0), num_keys=1), "array of arrays"),
    "key_twice": (lambda path: write(path, 2 * array(ValueType.UINT8, 0), num_keys=2), "has the key 'key' twice"),
    "odd_alignment": (
        lambda path: write(path, string(b"general.alignment"), struct.pack("<II", ValueType.UINT32, 33), num_keys=1),
        "alignment is 33",
    ),
    "text_alignment": (
        lambda path: write(path, string(b"general.alignment"), struct.pack("<I", ValueType.STRING), string(b"x"), num_keys=1),
        "alignment is 'x'",
    ),
    "dimensions": (lambda path: write(path, tensor(b"t", (1,) * 5), num_tensors=1), "'t' has 5 dimensions"),
    "tensor_type": (lambda path: write(path, tensor(b"t", (1,), 99), num_tensors=1), "'t' is of the unknown type 99"),
    "half_block": (lambda path: write(path, tensor(b"t", (48,), 2), num_tensors=1), "'t' are not made of whole blocks"),
    "tensor_twice": (lambda path: write(path, 2 * tensor(b"t", ()), num_tensors=2), "two tensors of the same name"),
    "misaligned": (lambda path: write(path, tensor(b"t", (1,), 0, 4), bytes(99), num_tensors=1), "overlap or are not aligned"),
    "overlap": (
        lambda path: write(path, tensor(b"t", (9,)), tensor(b"u", (9,), 0, 32), bytes(999), num_tensors=2),
        "overlap or are not aligned",
    ),
    "huge_tensor": (lambda path: write(path, tensor(b"t", (U64_MAX,) * 4), num_tensors=1), "tensors end at byte"),
    "directory": (lambda path: path.mkdir(), "is not a file"),
    "pipe": (lambda path: os.mkfifo(path), "is not a file"),
    "missing": (lambda path: None, "No such file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_whole_gguf_file_is_refused_in_one_sentence_that_says_why(tmp_path, name):
    make, reason = BROKEN[name]
    path = tmp_path / "broken.gguf"
    make(path)
    with pytest.raises(ModelFileError, match=reason) as caught:
        gguf.read(path)
    assert str(caught.value).startswith("broken.gguf ")
    assert str(caught.value).endswith(".")


def test_two_tensors_may_share_one_range(tmp_path):
    path = write(tmp_path / "tied.gguf", tensor(b"t", (9,)), tensor(b"u", (9,)), bytes(99), num_tensors=2)
    assert [t.name for t in gguf.read(path).tensors] == ["t", "u"]


def test_a_cut_download_is_told_with_both_sizes(model, tmp_path):
    data = model.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[:-64])
    with pytest.raises(ModelFileError, match=rf"is cut: its tensors end at byte {len(data)}, .* has {len(data) - 64} bytes"):
        gguf.read(path)


@pytest.mark.parametrize("step", range(0, 4000, 97))
def test_a_file_cut_anywhere_in_its_header_is_refused(model, tmp_path, step):
    path = tmp_path / "cut.gguf"
    path.write_bytes(model.read_bytes()[:step])
    with pytest.raises(ModelFileError):
        gguf.read(path)


def test_a_header_without_end_is_refused_by_its_size(tmp_path):
    path = write(tmp_path / "endless.gguf", array(ValueType.UINT8, 10**9), num_keys=1)
    os.truncate(path, 2 * 10**9)  # a sparse file
    with pytest.raises(ModelFileError, match="header of more than 33554432 bytes"):
        gguf.read(path)


@settings(max_examples=150, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 700) | st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=20))
def test_changed_bytes_give_a_header_or_a_refusal_and_nothing_else(model, tmp_path_factory, changes):
    data = bytearray(model.read_bytes())
    for position, byte in changes:
        data[position % len(data)] = byte
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(data)
    try:
        header = gguf.read(path)
    except ModelFileError as error:
        assert len(str(error).encode()) < 400  # a message that can be sent
    else:
        assert header.size == len(data)
