import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve import config
from llmserve.engine import gguf
from llmserve.engine.chat_template import Control, Text
from llmserve.engine.ctransformers_backend import CTransformersBackend
from llmserve.engine.tokenizer import BPETokenizer, LibraryTokenizer, Place
from llmserve.engine.vocabulary import Vocabulary
from llmserve.errors import ModelFileError
from llmserve.models import sources
from tests import tiny_models
from tests.tiny_models import BYTE_LEVEL

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
WORDS = "hello Ġhello 's 'S 1234 !! Ġ!! ĊĊ ĠĠĠ !Ċ é ĉĠ".split()


def bpe_metadata(*, words=WORDS, special=(("<|end|>", CONTROL),), **values):
    """All bytes, and the words, merged from their left ends; in front of them the special tokens, the first of them EOS"""
    prefixes = list(dict.fromkeys(word[:length] for word in words for length in range(2, len(word) + 1)))
    tokens = [*(text for text, _ in special), *BYTE_LEVEL.values(), *prefixes]
    keys = {
        "tokens": tokens,
        "merges": [f"{prefix[:-1]} {prefix[-1]}" for prefix in prefixes],
        "token_type": [token_type for _, token_type in special] + [NORMAL] * (len(tokens) - len(special)),
        "eos_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (keys | values).items() if value is not None}


def bpe(**options):
    return BPETokenizer.from_gguf(bpe_metadata(**options))


def pieces(tokenizer, text):
    return [tokenizer.piece(token_id) for token_id in tokenizer.encode_text(text)]


def spelled(tokenizer, text):
    return b"".join(pieces(tokenizer, text)).decode()


# Byte-level BPE.


@pytest.mark.parametrize(
    ("pre", "expected"),
    [  # llama.cpp makes the same of a file with this vocabulary
        ("gpt-2", "hello|'s| |1234| |$|!!| |hello|'|S|  | |hello|!!|\n\n|\t| |1234|é"),
        ("smollm", "hello|'s| |1|2|3|4| |$|!!| |hello|'|S|  | |hello|!!|\n\n|\t |1|2|3|4|é"),
        ("llama-bpe", "hello|'s| |123|4| |$|!!| hello|'S|  | hello|!!|\n\n|\t| |123|4|é"),
        ("qwen2", "hello|'s| |1|2|3|4| |$|!!| |hello|'S|  | |hello|!!|\n\n|\t| |1|2|3|4|é"),
        ("default", "hello|'|s| |123|4| |$|!!| |hello|'|S|  | |hello|!!|\n\n|\t| |123|4|é"),
        (None, "hello|'|s| |123|4| |$|!!| |hello|'|S|  | |hello|!!|\n\n|\t| |123|4|é"),
        ("falcon", "hello|'|s| |123|4| |$|!!| |hello|'|S|  | |hello|!!|\n\n|\t| |123|4|é"),
        ("deepseek-coder", "hello|'|s| |1|2|3|4| |$|!!| |hello|'|S|  | |hello|!!|\n|\n|\t |1|2|3|4|é"),
        ("deepseek-llm", "hello|'|s| |1234| |$|!!| |hello|'|S|  | |hello|!!|\n|\n|\t |1234|é"),
    ],
)
def test_text_is_cut_as_the_named_pre_tokenizer_does(pre, expected):
    words = [*WORDS[:-2], "Ã©", WORDS[-1]]
    text = "hello's 1234 $!! hello'S   hello!!\n\n\t 1234é"
    assert b"|".join(pieces(bpe(words=words, pre=pre), text)).decode() == expected


def test_an_unknown_pre_tokenizer_is_named():
    with pytest.raises(ModelFileError, match="'brand-new'"):
        bpe(pre="brand-new")


def test_a_control_token_in_text_is_only_text():
    tokenizer = bpe(pre="llama-bpe", special=[("<|end|>", CONTROL), ("hello!", CONTROL), ("bye", UNKNOWN)])
    for text in tokenizer.control_texts:
        assert not set(tokenizer.encode_text(text)) & set(tokenizer.control_texts.values())
        assert spelled(tokenizer, text) == text


def test_a_control_segment_is_its_token_and_has_no_piece():
    tokenizer = bpe()
    token_ids = tokenizer.encode([Text("hello"), Control("<|end|>"), Text("hello")])
    assert token_ids == [*tokenizer.encode_text("hello"), 0, *tokenizer.encode_text("hello")]
    assert tokenizer.piece(0) == b""


def test_a_user_defined_token_is_found_in_text():
    tokenizer = bpe(special=[("<|end|>", CONTROL), ("<tool>", USER_DEFINED), ("  ", USER_DEFINED)])
    assert tokenizer.encode_text("hello<tool>hello") == [*tokenizer.encode_text("hello"), 1, *tokenizer.encode_text("hello")]
    assert tokenizer.encode_text("a  b")[1] == 2
    assert spelled(tokenizer, "hello <tool> \n") == "hello <tool> \n"


@pytest.mark.parametrize(("pre", "begins_with_bos"), [("smollm", False), ("llama-bpe", True)])
def test_bos_is_put_in_front_where_models_of_that_kind_want_it(pre, begins_with_bos):
    tokenizer = bpe(pre=pre, special=[("<|end|>", CONTROL), ("<|begin|>", CONTROL)], bos_token_id=1)
    assert (tokenizer.encode([Text("hello")])[0] == 1) is begins_with_bos


def test_bos_that_the_template_wrote_is_not_doubled():
    tokenizer = bpe(special=[("<|end|>", CONTROL), ("<|begin|>", CONTROL)], bos_token_id=1, add_bos_token=True)
    assert tokenizer.encode([Control("<|begin|>"), Control("<|end|>")]) == [1, 0]
    assert tokenizer.encode([Control("<|end|>")]) == [1, 0]
    assert tokenizer.encode([]) == [1]


def test_half_a_surrogate_pair_is_read_as_a_replacement_character():
    assert spelled(bpe(), "a\ud83d b\udc00 \U0001f600") == "a\ufffd b\ufffd \U0001f600"


def test_the_longest_piece_bounds_the_number_of_tokens():
    assert bpe().max_piece_size == len("\u0120hello")


@pytest.mark.parametrize(
    "values",
    [
        {"merges": None},
        {"merges": ["hello"]},
        {"merges": ["h e l"]},
        {"merges": ["h "]},
        {"merges": [" h"]},
        {"merges": ["h missing"]},
        {"merges": ["h z"]},
        {"merges": ["< |end|>"]},
        {"tokens": ["<|end|>", "\udcff"], "token_type": None},
    ],
)
def test_a_tokenizer_that_cannot_be_built_is_the_files_fault(values):
    with pytest.raises(ModelFileError):
        bpe(**values)


def test_threads_tokenize_at_the_same_time():
    tokenizer = bpe()
    texts = [f"hello {number}!!\n\n" * number for number in range(60)]
    expected = [tokenizer.encode_text(text) for text in texts]
    results = [[] for _ in range(8)]
    threads = [
        threading.Thread(target=lambda result=result: result.extend(map(tokenizer.encode_text, texts))) for result in results
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result == expected for result in results)


TOKENIZER = bpe(special=[("<|end|>", CONTROL), ("<tool>", USER_DEFINED)])


@given(st.text() | st.lists(st.sampled_from(["<|end|>", "<tool>", "<|", "end|>", " ", "\n", "hello", "é"])).map("".join))
def test_tokens_spell_the_text_they_were_made_of(text):
    assert spelled(TOKENIZER, text) == text
    assert 0 not in TOKENIZER.encode_text(text)


@pytest.mark.slow
def test_the_default_models_tokens_are_those_of_llama_cpp():
    path = sources.fetch(config.DEFAULT_MODEL, config.load().server.cache_folder)
    tokenizer = BPETokenizer.from_gguf(gguf.read(path).metadata)
    assert tokenizer.eos_token_ids == {0, 2}
    assert tokenizer.encode([Control("<|im_start|>"), Text("user\nHi")]) == [1, 4093, 198, 26843]
    for text, expected in {
        "Hello, world!": [19556, 28, 905, 17],
        "I'm sure they'll say we've 'em": [57, 5248, 2090, 502, 3060, 1643, 392, 3543, 637, 391],
        "12345 + 678": [33, 34, 35, 36, 37, 1232, 216, 38, 39, 40],
        "  two  spaces\tand\ttabs ": [216, 827, 216, 5600, 197, 397, 197, 100, 7366, 216],
        "line\n\nline\r\n": [1311, 198, 198, 1311, 2738],
        "def f(x):\n    return x ** 2\n": [1604, 275, 24, 104, 727, 472, 1003, 1792, 1903, 216, 34, 198],
        "naïve café": [3546, 46494, 37366],
        "日本語と한국어": [23274, 115, 40993, 179, 120, 248, 7365, 118, 33085, 246, 181, 130, 251, 183, 240, 129],
        "😀👩\u200d💻": [10813, 242, 218, 10813, 235, 119, 321, 231, 10813, 236, 136],
        "\u00a0\u3000\u2028x": [15442, 12109, 218, 321, 118, 104],
        "<|im_end|>": [44, 108, 306, 79, 486, 108, 46],
        "</s><s>[INST]": [9617, 99, 21198, 99, 46, 75, 39637, 77],
        " " * 70: [40686, 5013],
    }.items():
        assert tokenizer.encode_text(text) == expected, text


# Libraries' own tokenizers.


def spm_metadata(*special, **values):
    """Special tokens, then all bytes, then what it takes to merge "</s>" """
    tokens = [
        *special,
        *((f"<0x{byte:02X}>", BYTE) for byte in range(256)),
        *((text, NORMAL) for text in ("▁", "▁a", "a", "</")),
    ]
    keys = {"tokens": [text for text, _ in tokens], "token_type": [kind for _, kind in tokens], **values}
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def sentencepiece(metadata):
    """A library that puts a space in front, and takes the longest token wherever it is, control tokens too"""
    ids = {text.replace("▁", " "): token_id for token_id, text in enumerate(metadata["tokenizer.ggml.tokens"])}

    def tokenize(text):
        assert b"\0" not in text
        assert text
        rest, token_ids = f" {text.decode()}", []
        while rest:
            found = next((rest[:length] for length in range(len(rest), 0, -1) if rest[:length] in ids), None)
            token_ids += [ids[found]] if found else [ids[f"<0x{byte:02X}>"] for byte in rest[0].encode()]
            rest = rest[len(found or rest[0]) :]
        return token_ids

    return tokenize


def library_tokenizer(*special, **values):
    metadata = spm_metadata(*special, **values)
    return LibraryTokenizer.from_gguf(metadata, sentencepiece(metadata))


S = ("<s>", CONTROL), ("</s>", CONTROL)


@pytest.mark.parametrize("text", ["</s>", "a</s>a", "<s></s><s>", "</</s>s>", " <s>"])
def test_a_control_token_that_a_library_finds_in_text_is_only_text(text):
    tokenizer = library_tokenizer(*S)
    assert {0, 1}.isdisjoint(tokenizer.encode_text(text))
    assert spelled(tokenizer, text) == f" {text}"


def test_a_control_token_that_cannot_be_cut_is_left_out():
    tokenizer = library_tokenizer(("#", CONTROL))
    assert tokenizer.encode_text("a#a") == tokenizer.encode_text("aa")


def test_each_text_has_the_space_that_sentencepiece_puts_in_front():
    tokenizer = library_tokenizer(*S, bos_token_id=0)
    token_ids = tokenizer.encode([Control("<s>"), Text("a"), Control("</s>"), Text("a")])
    assert [tokenizer.piece(token_id) for token_id in token_ids] == [b"", b" a", b"", b" a"]


def test_no_text_has_it_where_the_model_does_not_want_it():
    assert pieces(library_tokenizer(*S, add_space_prefix=False), "a</s> a") == [b"a", b"<", b"/", b"s", b">", b" a"]


def test_a_user_defined_token_is_found_in_text_before_the_library_sees_it():
    tokenizer = library_tokenizer(*S, ("<tool>▁x", USER_DEFINED))
    assert tokenizer.encode_text("a<tool> xa")[1] == 2
    assert pieces(tokenizer, "a<tool> xa") == [b" a", b"<tool> x", b" a"]


def test_what_a_library_cannot_be_given_is_replaced():
    assert spelled(library_tokenizer(*S), "a\0a\ud800") == " a\ufffda\ufffd"


def test_a_library_is_called_once_for_all_texts_of_a_prompt():
    calls = []

    def tokenize(texts, place):
        calls.append((texts, place))
        return [[9] * len(text) for text in texts]

    tokenizer = LibraryTokenizer(Vocabulary.from_spm(spm_metadata(*S, ("<tool>", USER_DEFINED), bos_token_id=0)), tokenize)
    token_ids = tokenizer.encode([Control("<s>"), Text("ab<tool>cde"), Control("</s>"), Text(""), Control("</s>"), Text("f")])
    assert calls == [([b"ab", b"cde", b"f"], Place.FIRST)]
    assert token_ids == [0, 9, 9, 2, 9, 9, 9, 1, 1, 9]


def test_one_thread_at_a_time_is_in_the_library():
    in_library = {b"first": threading.Event(), b"second": threading.Event()}
    overlaps = []

    def tokenize(text):
        in_library[text].set()
        if text == b"first":
            overlaps.append(in_library[b"second"].wait(0.1))
        return list(text)

    tokenizer = LibraryTokenizer.from_pieces([b"a"], tokenize)
    first = threading.Thread(target=tokenizer.encode_text, args=("first",))
    first.start()
    assert in_library[b"first"].wait(10)
    assert tokenizer.encode_text("second") == list(b"second")
    first.join()
    assert overlaps == [False]


def chunks_of(text):
    """What a library of a GGML file is given of a text"""
    chunks = []
    LibraryTokenizer.from_pieces([b"a"], lambda chunk: chunks.append(chunk) or []).encode_text(text)
    return chunks


@given(st.lists(st.sampled_from(["hello", " ", "   ", "\n", "é", "😀" * 70, "x" * 300])).map("".join))
def test_a_library_is_given_short_chunks_of_whole_characters(text):
    chunks = chunks_of(text)
    assert "".join(chunk.decode() for chunk in chunks) == text
    assert all(0 < len(chunk) <= 256 for chunk in chunks)


def test_chunks_are_cut_between_words():
    first, *others = chunks_of("a few  words\n" * 100)
    assert first.startswith(b"a few")
    assert all(chunk[:1].isspace() and len(chunk) > 200 for chunk in others[:-1])
    assert not any(chunk[-1:].isspace() for chunk in (first, *others[:-1]))


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    path = tiny_models.write_llama_spm(tmp_path_factory.mktemp("spm") / "spm.gguf")
    backend = CTransformersBackend(path, 64)
    yield LibraryTokenizer.from_gguf(gguf.read(path).metadata, backend.tokenize)
    backend.close()


@pytest.fixture(scope="module")
def ggml(tmp_path_factory):
    backend = CTransformersBackend(tiny_models.write_ggml_gpt2(tmp_path_factory.mktemp("ggml") / "gpt2.bin"), 64, "gpt2")
    pieces = [backend.piece(token_id) for token_id in range(backend.vocab_size)]
    yield LibraryTokenizer.from_pieces(pieces, backend.tokenize)
    backend.close()


def test_a_real_sentencepiece_vocabulary_spells_text(spm):
    assert pieces(spm, "hello river") == [b" hello", b" river"]
    assert spelled(spm, "日本 </s> 😀\n") == " 日本 </s> 😀\n"
    assert spm.encode([Text("hello")])[0] == spm.bos_token_id == 1
    assert spm.eos_token_ids == {2}


def test_a_real_ggml_vocabulary_spells_text(ggml):
    assert pieces(ggml, "a hello river") == [b"a", b" hello", b" river"]
    assert spelled(ggml, "日本 <|endoftext|> 😀\n") == "日本 <|endoftext|> 😀\n"
    assert ggml.eos_token_ids == {ggml.control_texts["<|endoftext|>"]}


@pytest.mark.parametrize("text", [" " * 100_000, "x" * 20_000, "é" * 10_000], ids=["spaces", "letters", "others"])
def test_a_long_run_neither_ends_the_process_nor_takes_minutes(ggml, text):
    """Given whole, the spaces overflow the stack of the library's regular expression, and the rest takes quadratic time."""
    assert spelled(ggml, text) == text
