"""What a model file says of its tokens: metadata or pieces in, facts out. Knows nothing of how text is cut into tokens."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from llmserve.engine import infill
from llmserve.engine.gguf import Strings
from llmserve.engine.output_parser import MARKERS
from llmserve.errors import ModelFileError

Metadata = Mapping[str, Any]
"""A GGUF file's keys and values. Text that is not UTF-8 holds surrogate escapes."""


class Pieces(Sequence[bytes]):
    """The bytes of every token, by id. Immutable. One block of memory: as objects they would take five times as much."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        data, ends = bytearray(), array("I", [0])
        for piece in pieces:
            data += piece
            ends.append(len(data))
        self._data, self._ends = bytes(data), ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, token_id: int) -> bytes: ...
    @overload
    def __getitem__(self, token_id: slice) -> list[bytes]: ...
    def __getitem__(self, token_id: int | slice) -> bytes | list[bytes]:
        if isinstance(token_id, slice):
            return [self[each] for each in range(*token_id.indices(len(self)))]
        return self._data[self._ends[token_id] : self._ends[token_id + 1]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A model's tokens. `control_texts` are those that no text becomes, `user_texts` those that any text may hold whole.

    A piece has the exact bytes of its token, none for tokens that are no text; what marks tool calls and reasoning in an answer
    is text. EOS ids end a text or a turn.
    """

    pieces: Pieces
    control_texts: Mapping[str, int]
    user_texts: Mapping[str, int]
    eos_token_ids: frozenset[int]
    bos_token_id: int | None = None
    add_bos: bool = False

    @property
    def max_piece_size(self) -> int:
        return max(map(len, self.pieces), default=0) or 1

    @classmethod
    def from_bpe(cls, metadata: Metadata, *, add_bos: bool) -> Vocabulary:
        """Of a GGUF file with byte-level BPE, adding BOS by default or not. Raises ModelFileError."""
        return _vocabulary(metadata, _bpe_piece, add_bos)

    @classmethod
    def from_spm(cls, metadata: Metadata) -> Vocabulary:
        """Of a GGUF file with a SentencePiece tokenizer. Raises ModelFileError."""
        return _vocabulary(metadata, _spm_piece, add_bos=True)

    @classmethod
    def from_pieces(cls, pieces: Sequence[bytes]) -> Vocabulary:
        """Of a GGML file, where only their texts tell the control tokens."""
        controls = {
            text: token_id for token_id, piece in enumerate(pieces) if (text := piece.decode(errors="replace")) in _TURN_TEXTS
        }
        silent = set(controls.values())
        return cls(
            pieces=Pieces(b"" if token_id in silent else piece for token_id, piece in enumerate(pieces)),
            control_texts=controls,
            user_texts={},
            eos_token_ids=frozenset(controls[text] for text in _END_TEXTS if text in controls),
        )

    @classmethod
    def from_library(
        cls, metadata: Metadata, pieces: Iterable[bytes], ends: Iterable[int], bos_token_id: int | None, add_bos: bool
    ) -> Vocabulary:
        """Of a GGUF file, as its library reads it: that one finds user-defined tokens in a text by itself. Raises ModelFileError."""
        controls = {text: token_id for token_id, (text, kind) in enumerate(_tokens(metadata)) if kind in (_CONTROL, _UNKNOWN)}
        shown = {controls[text]: text.encode() for text in MARKERS if text in controls}
        pieces = (shown.get(token_id, piece) for token_id, piece in enumerate(pieces))
        return cls(Pieces(pieces), controls, {}, frozenset(ends), bos_token_id, add_bos)


def special_texts(metadata: Metadata) -> dict[str, str]:
    """What a GGUF file's chat template knows as bos_token, eos_token, …. Raises ModelFileError."""
    texts = token_texts(metadata)
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "cls": "cls", "mask": "mask"}
    ids = {f"{name}_token": _special_id(metadata, key) for name, key in keys.items()}
    return {name: texts[token_id] for name, token_id in ids.items() if token_id is not None}


def token_texts(metadata: Metadata) -> Sequence[str]:
    """The tokens as a GGUF file spells them, by id. Raises ModelFileError."""
    return strings(metadata, "tokenizer.ggml.tokens")


def strings(metadata: Metadata, key: str) -> Sequence[str]:
    """The value of `key`, which must be a list of strings and not empty. Raises ModelFileError."""
    value = metadata.get(key)
    if isinstance(value, Strings) or (isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)):
        texts: Sequence[str] = value
        if texts:
            return texts
    raise ModelFileError(f"The model file has no {key} that could be used.")


# Values of tokenizer.ggml.token_type (docs/gguf.md of ggml). Plain integers: 10^5 tokens are compared with them at each load.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SILENT = (_UNKNOWN, _CONTROL, _UNUSED)

_END_TEXTS = (
    *("</s>", "<eos>", "<EOT>", "<|EOT|>", "<|eot|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|im_end|>"),
    *("<|endoftext|>", "<|end_of_text|>", "<|end_of_turn|>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>"),
    *("<end_of_utterance>", "<｜end▁of▁sentence｜>", "### End"),
)
"""By these the families of models end a text or a turn. A file names one of its own at most, and often not the turn's."""

_TURN_TEXTS = frozenset(
    (
        *_END_TEXTS,
        *("<|im_start|>", "<start_of_turn>", "<|start_header_id|>", "<|end_header_id|>"),
        *("<|system|>", "<|user|>", "<|assistant|>", "### Instruction:", "### Response:"),
    )
)
"""By these they frame turns. Files of 2023 often call them user-defined, but a text that could become one forges a turn."""

_BYTES = dict(zip(range(0x100, 0x144), (*range(33), *range(127, 161), 173), strict=True))
"""Byte-level BPE spells printable Latin-1 as it is and the other bytes with the characters from U+0100 on (GPT-2's encoder)."""


def _vocabulary(metadata: Metadata, piece_of: Callable[[str, int], bytes], add_bos: bool) -> Vocabulary:
    controls: dict[str, int] = {}
    users: dict[str, int] = {}

    def spelled() -> Iterator[bytes]:
        for token_id, (text, token_type) in enumerate(_tokens(metadata)):
            piece = piece_of(text, token_type)
            if token_type in (_CONTROL, _UNKNOWN):
                controls[text] = token_id
            elif token_type == _USER_DEFINED:
                users[piece.decode(errors="replace")] = token_id
            yield piece

    pieces = Pieces(spelled())
    ends = [_special_id(metadata, key) for key in ("eos", "eot", "eom")]
    return Vocabulary(
        pieces=pieces,
        control_texts=controls,
        user_texts={text: token_id for text, token_id in users.items() if text not in controls},
        eos_token_ids=frozenset(end for end in (*ends, *map(controls.get, _END_TEXTS)) if end is not None),
        bos_token_id=_special_id(metadata, "bos"),
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos)),
    )


def _tokens(metadata: Metadata) -> Iterator[tuple[str, int]]:
    """Text and type of each token. Control tokens are those that the file calls so, and those that work so."""
    texts = token_texts(metadata)
    declared = {_special_id(metadata, key) for key in ("bos", "eos", "eot", "eom")}
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        types = [_USER_DEFINED if token_id in declared else _NORMAL for token_id in range(len(texts))]
    if not isinstance(types, list | tuple) or len(types) != len(texts):
        raise ModelFileError(f"The model file has {len(texts)} tokens, but not as many token types.")
    for token_id, (text, kind) in enumerate(zip(texts, types, strict=True)):
        works_so = kind == _USER_DEFINED and (token_id in declared or text in _TURN_TEXTS or text in infill.TEXTS)
        yield text, _CONTROL if works_so else kind


def _special_id(metadata: Metadata, key: str) -> int | None:
    """The id that the file gives for BOS, EOS, …; None if it is none of a token."""
    token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
    return token_id if isinstance(token_id, int) and 0 <= token_id < len(metadata["tokenizer.ggml.tokens"]) else None


def _bpe_piece(text: str, token_type: int) -> bytes:
    if token_type in _SILENT:
        return _silent_piece(text)
    if token_type != _USER_DEFINED:
        try:
            return text.translate(_BYTES).encode("latin-1")
        except UnicodeEncodeError:  # spelled as it is
            pass
    return text.encode(errors="surrogateescape")


def _silent_piece(text: str) -> bytes:
    return text.encode() if text in MARKERS else b""


def _spm_piece(text: str, token_type: int) -> bytes:
    if token_type in _SILENT:
        return _silent_piece(text)
    if token_type == _BYTE and (match := re.fullmatch("<0x([0-9A-F]{2})>", text)):
        return bytes.fromhex(match[1])
    return text.replace("▁", " ").encode(errors="surrogateescape")
