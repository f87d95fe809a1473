import pytest

from llmserve.engine.vocabulary import Vocabulary, special_texts
from llmserve.errors import ModelFileError
from tests.tiny_models import BYTE_LEVEL, bpe_vocabulary, spm_vocabulary

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def keys(**values):
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def vocabulary(*tokens, kind="bpe", **values):
    """Of (text, type) pairs"""
    metadata = keys(tokens=[text for text, _ in tokens], token_type=[token_type for _, token_type in tokens], **values)
    return Vocabulary.from_bpe(metadata, add_bos=False) if kind == "bpe" else Vocabulary.from_spm(metadata)


def test_byte_level_tokens_spell_every_byte():
    tokens, _, types = bpe_vocabulary()
    pieces = Vocabulary.from_bpe(keys(tokens=tokens, token_type=types), add_bos=False).pieces
    assert [pieces[tokens.index(character)] for character in BYTE_LEVEL.values()] == [bytes([byte]) for byte in BYTE_LEVEL]
    assert pieces[tokens.index("Ġhello")] == b" hello"


def test_sentencepiece_tokens_spell_spaces_and_bytes():
    tokens, scores, types = spm_vocabulary()
    pieces = Vocabulary.from_spm(keys(tokens=tokens, scores=scores, token_type=types)).pieces
    assert pieces[tokens.index("▁hello")] == b" hello"
    assert [pieces[tokens.index(f"<0x{byte:02X}>")] for byte in range(256)] == [bytes([byte]) for byte in range(256)]


@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_tokens_that_are_no_text_have_no_piece(kind):
    tokens = ("<unk>", UNKNOWN), ("<s>", CONTROL), ("[PAD]", UNUSED), ("a", NORMAL)
    assert vocabulary(*tokens, kind=kind).pieces == [b"", b"", b"", b"a"]


def test_no_text_becomes_the_unknown_token():
    assert vocabulary(("<unk>", UNKNOWN), ("<s>", CONTROL)).control_texts == {"<unk>": 0, "<s>": 1}


def test_a_text_of_two_tokens_is_a_control_token_if_one_of_them_is():
    found = vocabulary(("<x>", USER_DEFINED), ("<x>", CONTROL), ("<x>", USER_DEFINED))
    assert (found.control_texts, found.user_texts) == ({"<x>": 1}, {})


@pytest.mark.parametrize(("kind", "text"), [("bpe", "<tool> é"), ("spm", "<tool>▁é")])
def test_user_defined_tokens_are_spelled_as_text_and_found_by_it(kind, text):
    found = vocabulary((text, USER_DEFINED), kind=kind)
    assert found.pieces == ["<tool> é".encode()]
    assert found.user_texts == {"<tool> é": 0}
    assert found.control_texts == {}


def test_a_byte_level_token_with_other_characters_is_spelled_as_it_is():
    assert vocabulary(("日本", NORMAL)).pieces == ["日本".encode()]


def test_text_that_is_not_utf8_keeps_its_bytes():
    assert vocabulary((b"\xff".decode(errors="surrogateescape"), NORMAL), kind="spm").pieces == [b"\xff"]


def test_ends_of_turns_are_known_by_their_texts_and_by_the_files_keys():
    tokens = [(text, CONTROL) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<|x|>", "<|y|>")]
    assert vocabulary(*tokens, eos_token_id=4, eot_token_id=5).eos_token_ids == {0, 2, 3, 4, 5}


def test_a_word_that_reads_like_the_end_of_a_turn_is_none():
    assert vocabulary(("</s>", NORMAL), ("a", NORMAL)).eos_token_ids == frozenset()


def test_user_defined_tokens_that_frame_turns_are_control_tokens():
    found = vocabulary(("<|im_start|>", USER_DEFINED), ("<|im_end|>", USER_DEFINED), ("<|tool|>", USER_DEFINED))
    assert found.control_texts == {"<|im_start|>": 0, "<|im_end|>": 1}
    assert found.user_texts == {"<|tool|>": 2}
    assert found.pieces == [b"", b"", b"<|tool|>"]


def test_a_user_defined_token_that_the_file_ends_with_is_a_control_token():
    assert vocabulary(("<stop>", USER_DEFINED), ("a", NORMAL), eos_token_id=0).control_texts == {"<stop>": 0}


def test_without_types_the_tokens_that_the_file_names_are_control_tokens():
    metadata = keys(tokens=["<bos>", "a", "<eos>"], bos_token_id=0, eos_token_id=2)
    assert Vocabulary.from_bpe(metadata, add_bos=False).control_texts == {"<bos>": 0, "<eos>": 2}


def test_an_id_beyond_the_vocabulary_is_none():
    found = vocabulary(("a", NORMAL), bos_token_id=0xFFFFFFFF, eos_token_id=1)
    assert found.bos_token_id is None
    assert found.eos_token_ids == frozenset()


@pytest.mark.parametrize(("kind", "default"), [("bpe", False), ("spm", True)])
def test_bos_is_added_as_the_file_says_or_else_as_its_kind_does(kind, default):
    assert vocabulary(("<s>", CONTROL), kind=kind).add_bos is default
    assert vocabulary(("<s>", CONTROL), kind=kind, add_bos_token=not default).add_bos is not default


def test_the_longest_piece_has_a_byte_at_least():
    assert vocabulary(("a", NORMAL), ("bcd", NORMAL)).max_piece_size == 3
    assert vocabulary(("<s>", CONTROL)).max_piece_size == 1


def test_of_bare_pieces_those_that_frame_turns_are_control_tokens():
    found = Vocabulary.from_pieces([b"a", b"<|endoftext|>", b"\xff", b"<|system|>", b"<|end|>"])
    assert found.control_texts == {"<|endoftext|>": 1, "<|system|>": 3, "<|end|>": 4}
    assert found.eos_token_ids == {1, 4}
    assert found.pieces == [b"a", b"", b"\xff", b"", b""]


def test_templates_are_given_the_special_tokens_that_the_file_names():
    metadata = keys(tokens=["<s>", "</s>", "<unk>"], bos_token_id=0, eos_token_id=1, unknown_token_id=2, padding_token_id=9)
    assert special_texts(metadata) == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        keys(tokens=[]),
        keys(tokens="abc"),
        keys(tokens=[1, 2]),
        keys(tokens=["a", "b"], token_type=[1]),
        keys(tokens=["a", "b"], token_type=1),
    ],
)
def test_a_vocabulary_that_cannot_be_used_is_the_files_fault(metadata):
    with pytest.raises(ModelFileError):
        Vocabulary.from_spm(metadata)
