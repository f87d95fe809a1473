"""Grammars that answers are kept within: checked and compiled by llguidance, to which this is the only door. Knows no scores.

llguidance is imported when the first grammar comes, and its trie of a vocabulary is built then: 0.2 s and 25 MB for 49,152 tokens.
"""

from __future__ import annotations

import json
import threading
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmserve.engine.generation import Grammar
from llmserve.engine.json_schema import subschemas, with_real_dates
from llmserve.errors import InvalidGrammar

if TYPE_CHECKING:
    from llguidance import LLMatcher as LLMatcher  # for those who are given one
    from llguidance import LLParserLimits, LLTokenizer

    from llmserve.engine.tokenizer import Tokenizer

JSON = Any

_WHITESPACE = r"[ \n\t]{0,20}"
"""Between the tokens of JSON: unbounded, it is where a model can run away."""

_MAX_LOOKS = 1000
"""Subschemas that are tried to find the one that is wrong."""


def check(grammar: Grammar) -> None:
    """Raises InvalidGrammar for what no model could be kept within; of a JSON schema it says which part. Thread-safe."""
    reason = _fault(grammar)
    if reason and grammar.kind == "json_schema":
        raise InvalidGrammar(reason, path=_path_of_fault(json.loads(grammar.text), reason))
    if reason:
        raise InvalidGrammar(reason)


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._library: LLTokenizer | None = None  # guarded by _lock

    def compile(self, grammar: Grammar) -> LLMatcher:
        """A matcher at its beginning; copies of it belong to one thread each. Releases the GIL. Raises InvalidGrammar."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._library_tokenizer(), _source(grammar), log_level=0, limits=_limits())
        if matcher.is_error():
            check(grammar)
            raise InvalidGrammar(_reason(matcher.get_error()))
        return matcher

    def _library_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        with self._lock:
            if self._library is None:
                vocabulary = _Vocabulary(self._tokenizer)
                ends, slices = sorted(self._tokenizer.eos_token_ids), LLTokenizer.json_slices()
                self._library = LLTokenizer(vocabulary, self._tokenizer.vocab_size, ends or None, slices)  # type: ignore[arg-type]
            return self._library


class _Vocabulary:
    """A tokenizer as llguidance wants to see it: its TokenizerWrapper. Control tokens have no bytes, so no grammar has them."""

    is_tokenizer_wrapper = True
    special_token_ids = ()

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens = [tokenizer.piece(token_id) for token_id in range(tokenizer.vocab_size)]
        self.bos_token_id = tokenizer.bos_token_id
        self.eos_token_id = min(tokenizer.eos_token_ids, default=0)
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        """How the model would write what the grammar leaves no choice in. Must spell it exactly, and not raise.

        By the longest tokens, where the tokenizer would spell something else (SentencePiece, with a space in front): of no
        tokens the library would conclude that nothing may follow.
        """
        data = text.encode() if isinstance(text, str) else text
        token_ids = self._tokenizer.encode_text(data.decode("utf-8", "replace")) if data else []
        return token_ids if b"".join(map(self.tokens.__getitem__, token_ids)) == data else self._longest(data)

    def _longest(self, data: bytes) -> list[int]:
        """As far as there are tokens for it."""
        token_ids: list[int] = []
        start = 0
        while start < len(data):
            ends = range(min(len(data), start + self._tokenizer.max_piece_size), start, -1)
            end = next((end for end in ends if data[start:end] in self._ids), None)
            if end is None:
                break
            token_ids.append(self._ids[data[start:end]])
            start = end
        return token_ids

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        """By piece. Of two with the same the later one, for single bytes come first."""
        return {piece: token_id for token_id, piece in enumerate(self.tokens) if piece}


def _source(grammar: Grammar) -> str:
    """The grammar as llguidance takes it."""
    from llguidance import LLMatcher

    if grammar.kind == "json_schema":
        schema = json.dumps(with_real_dates(json.loads(grammar.text)))
        return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITESPACE})
    return LLMatcher.grammar_from_regex(grammar.text) if grammar.kind == "regex" else LLMatcher.grammar_from_lark(grammar.text)


def _fault(grammar: Grammar) -> str:
    """What is wrong with it, or ""."""
    from llguidance import LLMatcher

    failed, messages = LLMatcher.validate_grammar_with_warnings(_source(grammar), limits=_limits())
    return _reason(messages[0]) if failed else ""


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(verbose_errors=False)


def _reason(message: str) -> str:
    """An error of the library without the state of its parser, or of its stack."""
    return "It is more than can be enforced." if message.startswith("panic:") else message.partition("\n<")[0].strip()


def _path_of_fault(schema: JSON, reason: str) -> str:
    """Where the smallest subschema stands that is wrong in the same way, as ".properties.tags"; "" for the whole."""
    definitions = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    path, looks = "", 0
    while True:
        for step, part in subschemas(schema):
            looks += 1
            if looks > _MAX_LOOKS:
                return path
            if _fault(Grammar("json_schema", json.dumps(definitions | part))) == reason:
                path, schema = path + step, part
                break
        else:
            return path
