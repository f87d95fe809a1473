"""Prompt segments and text in, token ids out; token ids in, their bytes out.

Knows nothing of messages, backends or sampling. A text never becomes a control token: only a `Control` segment does.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Protocol

from llmserve.engine.chat_template import Control, Literals, Segment, Text
from llmserve.engine.vocabulary import Metadata, Vocabulary, strings, token_texts
from llmserve.errors import ModelFileError

if TYPE_CHECKING:
    import tokenizers


class Place(StrEnum):
    """Where a text stands that a library tokenizes."""

    FIRST = "first"  # by itself, or behind a control token
    REST = "rest"  # behind other text
    WHOLE = "whole"  # it is all there is, and gets the tokens around it that the model was trained with


TokenizeText = Callable[[bytes], list[int]]
"""A library's tokenizer: token ids, without BOS, of UTF-8 that is not empty and holds no NUL."""

Tokenize = Callable[[Sequence[bytes], Place], list[list[int]]]
"""The same for several texts at the same place, for one call may be a way to another process and back. Thread-safe."""


class Tokenizer(Protocol):
    """How a model reads and writes text. Thread-safe.

    Half a surrogate pair is read as U+FFFD; bytes that a vocabulary has no token for are left out.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def add_bos(self) -> bool:
        """Whether every prompt begins with `bos_token_id`."""
        ...

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The ids that end an answer: those that end a text or a turn."""
        ...

    @property
    def control_texts(self) -> Mapping[str, int]:
        """The control tokens by text: what `encode` makes of `Control` segments, and of nothing else."""
        ...

    @property
    def max_piece_size(self) -> int:
        """Bytes of the longest piece: text of n bytes that can all be spelled has n / `max_piece_size` tokens or more."""
        ...

    def encode(self, segments: Sequence[Segment]) -> list[int]:
        """The ids of a whole prompt, with BOS in front where the model wants it, and once only."""
        ...

    def encode_text(self, text: str) -> list[int]:
        """The ids of a text, without BOS."""
        ...

    def piece(self, token_id: int) -> bytes:
        """The exact bytes of one token, perhaps half a character; none for a control token."""
        ...


class BPETokenizer:
    """Byte-level BPE by the `tokenizers` library, made of a GGUF file's own keys.

    Thread-safe, and threads tokenize at the same time: the library releases the GIL and locks its cache.
    """

    def __init__(self, vocabulary: Vocabulary, make_library: Callable[[], tokenizers.Tokenizer]) -> None:
        """`make_library` is called when text is first read. What it makes must not know the control tokens."""
        self.vocab_size = len(vocabulary.pieces)
        self.bos_token_id = vocabulary.bos_token_id
        self.add_bos = vocabulary.add_bos
        self.eos_token_ids = vocabulary.eos_token_ids
        self.control_texts = vocabulary.control_texts
        self.max_piece_size = vocabulary.max_piece_size
        self._pieces = vocabulary.pieces
        self._library = functools.cache(make_library)

    @classmethod
    def from_gguf(cls, metadata: Metadata, *, reads: bool = True) -> BPETokenizer:
        """For a file whose tokenizer.ggml.model is "gpt2"; `reads` text from the start, or hardly ever. Raises ModelFileError."""
        name = metadata.get("tokenizer.ggml.pre", "default")
        if name not in _SPLITS:
            raise ModelFileError(f"The model's pre-tokenizer {name!r} is not supported.")
        vocabulary = Vocabulary.from_bpe(metadata, add_bos=name in _LLAMA_3)
        tokenizer = cls(vocabulary, functools.partial(_library, metadata, vocabulary, name))
        if reads:
            tokenizer._library()
        return tokenizer

    def encode(self, segments: Sequence[Segment]) -> list[int]:
        token_ids: list[int] = []
        for segment in segments:
            if isinstance(segment, Control):
                token_ids.append(self.control_texts[segment.text])
            else:
                token_ids += self.encode_text(segment.text)
        return _with_bos(self, token_ids)

    def encode_text(self, text: str) -> list[int]:
        # Never a batch call: those start a pool of threads, which does not survive a fork.
        return self._library().encode(_without_surrogates(text), add_special_tokens=False).ids

    def piece(self, token_id: int) -> bytes:
        return self._pieces[token_id]


class LibraryTokenizer:
    """The tokenizer inside of a backend's library, which is called once for all texts of a prompt. Thread-safe.

    NUL is read as U+FFFD, since the library's strings end there.
    """

    def __init__(self, vocabulary: Vocabulary, tokenize: Tokenize) -> None:
        """`tokenize` is the bare library's: `encode` is for everybody else."""
        self.vocabulary = vocabulary
        self.tokenize = tokenize
        self.vocab_size = len(vocabulary.pieces)
        self.bos_token_id = vocabulary.bos_token_id
        self.add_bos = vocabulary.add_bos
        self.eos_token_ids = vocabulary.eos_token_ids
        self.control_texts = vocabulary.control_texts
        self.max_piece_size = vocabulary.max_piece_size
        self._pieces = vocabulary.pieces
        self._control_ids = frozenset(vocabulary.control_texts.values())
        self._controls = Literals(vocabulary.control_texts)
        self._user_texts = vocabulary.user_texts
        self._users = Literals(vocabulary.user_texts)

    @classmethod
    def from_gguf(cls, metadata: Metadata, tokenize: TokenizeText) -> LibraryTokenizer:
        """For a file whose tokenizer.ggml.model is "llama": SentencePiece, where the library puts a space before each text.

        Raises ModelFileError.
        """
        tokenize_rest = _without_space(tokenize)
        if not metadata.get("tokenizer.ggml.add_space_prefix", True):
            tokenize = tokenize_rest
        return cls(Vocabulary.from_spm(metadata), text_by_text(tokenize, tokenize_rest))

    @classmethod
    def from_pieces(cls, pieces: Sequence[bytes], tokenize: TokenizeText) -> LibraryTokenizer:
        """For a GGML file, given the piece of every token."""
        tokenize = _in_chunks(tokenize)
        return cls(Vocabulary.from_pieces(pieces), text_by_text(tokenize, tokenize))

    def encode(self, segments: Sequence[Segment]) -> list[int]:
        return _with_bos(self, self._encode(list(chain.from_iterable(map(self._parts, segments)))))

    def encode_text(self, text: str) -> list[int]:
        return self._encode(list(self._parts(Text(text))))

    def piece(self, token_id: int) -> bytes:
        return self._pieces[token_id]

    def _parts(self, segment: Segment) -> Iterator[int | str]:
        """Control and user-defined tokens' ids, and the text between them, none empty."""
        if isinstance(segment, Control):
            yield self.control_texts[segment.text]
            return
        for index, part in enumerate(self._users.split(_without_surrogates(segment.text).replace("\0", "\ufffd"))):
            if index % 2:
                yield self._user_texts[part]
            elif part:
                yield part

    def _encode(self, parts: Sequence[int | str]) -> list[int]:
        encoded = iter(self._encode_ordinary([part for part in parts if isinstance(part, str)]))
        return list(chain.from_iterable(next(encoded) if isinstance(part, str) else (part,) for part in parts))

    def _encode_ordinary(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without user-defined tokens.

        Some libraries make control tokens of text, merging "</" and "s>" or looking for words of their own. Then the text is
        given to it again in parts, cut inside of every control token's text.
        """
        if not texts:
            return []
        encoded = self.tokenize([text.encode() for text in texts], Place.FIRST)
        return [
            token_ids if self._control_ids.isdisjoint(token_ids) else self._encode_cut(text)
            for text, token_ids in zip(texts, encoded, strict=True)
        ]

    def _encode_cut(self, text: str) -> list[int]:
        first, *rest = [part.encode() for part in _cut(text, [start + 1 for start in self._controls.starts(text)])]
        encoded = chain(self.tokenize([first], Place.FIRST), self.tokenize(rest, Place.REST))
        return [token_id for token_id in chain.from_iterable(encoded) if token_id not in self._control_ids]


def _with_bos(tokenizer: Tokenizer, token_ids: list[int]) -> list[int]:
    bos = tokenizer.bos_token_id
    if tokenizer.add_bos and bos is not None and token_ids[:1] != [bos]:
        token_ids.insert(0, bos)
    return token_ids


def _without_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _cut(text: str, indices: Sequence[int]) -> list[str]:
    return [text[begin:end] for begin, end in pairwise([0, *indices, len(text)])]


# Byte-level BPE.

_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CL100K = (
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
)
_DEEPSEEK_CJK = "[一-龥ࠀ-一가-퟿]+"

_LLAMA_3 = frozenset(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"))
"""Pre-tokenizers of models that want BOS, and take a word that is a token whole as that token, whatever its merges are."""

_SPLITS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"), (_GPT_2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), (r"\p{N}", _GPT_2)),
    **dict.fromkeys((*_LLAMA_3, "dbrx", "smaug-bpe"), (_CL100K.format(digits="{1,3}"),)),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen"), (_CL100K.format(digits=""),)),
    "default": (r"[\p{P}$+<=>^~|]+", _GPT_2, r"\p{N}+", "[0-9]{3}"),
    "falcon": (r"[\p{P}$+<=>^~|`]+", _GPT_2, "[0-9]{3}"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}"),
    "deepseek-llm": (
        *(r"[\r\n]", r"\s?[\p{Lu}\p{Ll}\p{Lt}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
        *(r"\s+$", _DEEPSEEK_CJK, r"\p{N}+"),
    ),
}
"""How text is cut before it is merged, by the tokenizer.ggml.pre of llama.cpp: each expression cuts what the one before left,
into its matches and what lies between them. Spaces that end no match stay together, so GPT-2's last branch is not needed."""


def _library(metadata: Metadata, vocabulary: Vocabulary, pre: str) -> tokenizers.Tokenizer:
    # Imported here: it takes 6 MB that models with another tokenizer do not need.
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

    texts = token_texts(metadata)
    ids = {text: token_id for token_id, text in enumerate(texts) if text not in vocabulary.control_texts}
    merges = list(map(_pair, strings(metadata, "tokenizer.ggml.merges")))
    try:
        library = Tokenizer(models.BPE(ids, merges, ignore_merges=pre in _LLAMA_3))
    except Exception as error:  # the library raises it plain
        raise ModelFileError(f"The model's tokenizer cannot be built: {error}.") from error
    library.add_tokens([AddedToken(text, normalized=False) for text in vocabulary.user_texts])
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in _SPLITS[pre]]
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return library


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


# Libraries' own tokenizers.


def text_by_text(tokenize: TokenizeText, tokenize_rest: TokenizeText, tokenize_whole: TokenizeText | None = None) -> Tokenize:
    """A library of this process, which one thread at a time calls."""
    at_place = {Place.FIRST: tokenize, Place.REST: tokenize_rest, Place.WHOLE: tokenize_whole or tokenize}
    lock = threading.Lock()

    def tokenize_all(texts: Sequence[bytes], place: Place) -> list[list[int]]:
        with lock:
            return list(map(at_place[place], texts))

    return tokenize_all


_CHUNK = re.compile(rb"(?s).{1,256}\Z|.{1,256}(?<=\S)(?=\s)|.{1,253}.{0,3}?(?![\x80-\xBF])")


def _in_chunks(tokenize: TokenizeText) -> TokenizeText:
    """ctransformers' tokenizer of GGML files, which takes time with the cube of a word's length, and whose regular expression
    overflows the stack: a run of 10^5 spaces ends the process. It gets 256 bytes at most, cut between words where it can be.
    """

    def tokenize_chunks(text: bytes) -> list[int]:
        return [token_id for chunk in _CHUNK.findall(text) for token_id in tokenize(chunk)]

    return tokenize_chunks


def _without_space(tokenize: TokenizeText) -> TokenizeText:
    """SentencePiece without the space in front, by a text before it that nothing merges with."""
    other = b"\x01"
    num_other = len(tokenize(other))
    return lambda text: tokenize(other + text)[num_other:]
