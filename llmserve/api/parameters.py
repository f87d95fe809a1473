"""The parameters of every endpoint that generates: how tokens are chosen, where an answer ends, what it is kept within."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from llmserve.api import JSON
from llmserve.api.fields import (
    Array,
    Biases,
    Boolean,
    Either,
    Integer,
    Number,
    Object,
    OneOf,
    String,
    Strings,
    Struct,
    Tagged,
    optional,
    passive,
    required,
)
from llmserve.engine.generation import GenerationParams, Grammar, SamplingParams
from llmserve.errors import InvalidGrammar, InvalidParameter, InvalidRequest

if TYPE_CHECKING:
    from llmserve.engine.engine import Engine

INT32_MAX = 2**31 - 1
_MAX_STOP_STRINGS = 16
_MAX_CHOICES = 1024
_MAX_BIASES = 1024
_MAX_END_IDS = 64


class StreamOptions(Struct):
    include_usage: bool = optional(Boolean(), False)
    include_obfuscation: bool = passive(Boolean(), False)  # padding against eavesdroppers: none is ever sent


class JSONSchema(Struct):
    """A schema that is not strict is kept to as well."""

    name: str = required(String(1, 64, "[A-Za-z0-9_-]*"))
    description: str | None = optional(String())
    schema: dict[str, JSON] = optional(Object(), {"type": "object"})
    strict: bool = optional(Boolean(), False)


class TextFormat(Struct):
    type: str = required(String())


class JSONObjectFormat(Struct):
    type: str = required(String())


class JSONSchemaFormat(Struct):
    type: str = required(String())
    json_schema: JSONSchema = required(JSONSchema)


ResponseFormat = TextFormat | JSONObjectFormat | JSONSchemaFormat

RESPONSE_FORMAT = Tagged("type", {"text": TextFormat, "json_object": JSONObjectFormat, "json_schema": JSONSchemaFormat})


class Guide(NamedTuple):
    """What an answer is kept within, and the parameter that said so."""

    param: str
    grammar: Grammar


class GenerationFields(Struct):
    """What the bodies of all endpoints that generate have in common. A struct that has more fields inherits from this one."""

    model: str = required(String())
    max_tokens: int | None = optional(Integer(1, INT32_MAX))
    n: int = optional(Integer(1, 128), 1)
    stop: str | tuple[str, ...] = optional(Either(String(1), Array(String(1), max_length=_MAX_STOP_STRINGS)), ())
    stream: bool = optional(Boolean(), False)
    stream_options: StreamOptions | None = optional(StreamOptions)
    seed: int | None = optional(Integer(-(2**63), 2**63 - 1))
    temperature: float = optional(Number(0, 2), 1.0)
    top_p: float = optional(Number(0, 1), 1.0)
    top_k: int = optional(Integer(-1, INT32_MAX), 0)
    min_p: float = optional(Number(0, 1), 0.0)
    presence_penalty: float = optional(Number(-2, 2), 0.0)
    frequency_penalty: float = optional(Number(-2, 2), 0.0)
    repetition_penalty: float = optional(Number(0.01, 2), 1.0)
    logit_bias: tuple[tuple[int, float], ...] = optional(Biases(_MAX_BIASES, 100), ())
    min_tokens: int = optional(Integer(0, INT32_MAX), 0)
    ignore_eos: bool = optional(Boolean(), False)
    stop_token_ids: tuple[int, ...] = optional(Array(Integer(0, INT32_MAX), max_length=_MAX_END_IDS), ())
    regex: str | None = optional(String(1))
    choice: tuple[str, ...] | None = optional(Array(String(1), 1, _MAX_CHOICES))
    grammar: str | None = optional(String(1))
    user: str | None = passive(String())
    metadata: dict[str, str] | None = passive(Strings(16, String(max_length=64), String(max_length=512)))
    service_tier: str | None = passive(OneOf(("auto", "default", "flex", "scale", "priority", "fast")))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else self.stop

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            logit_bias=self.logit_bias,
        )

    @property
    def guides(self) -> list[Guide]:
        """What the answer is to be kept within, by the parameters that say so; `check_fields` allows only one."""
        guides = []
        if self.regex is not None:
            guides.append(Guide("regex", Grammar("regex", self.regex)))
        if self.choice is not None:
            choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in self.choice)
            guides.append(Guide("choice", Grammar("lark", f"start: {choices}")))
        if self.grammar is not None:
            guides.append(Guide("grammar", Grammar("lark", self.grammar)))
        return guides

    @property
    def guide(self) -> Guide | None:
        return next(iter(self.guides), None)

    @property
    def shape(self) -> tuple[Any, ...]:
        """What shapes an answer beside its prompt, length and `sampling`, as JSON values: for the response cache's key."""
        guide = self.guide
        ends = (self.stop_strings, self.stop_token_ids, self.min_tokens, self.ignore_eos)
        return self.n, ends, guide and guide.grammar

    def params(self, max_tokens: int, engine: Engine) -> GenerationParams:
        """What the engine is asked for. Raises InvalidRequest for what this model cannot do."""
        vocab_size = engine.tokenizer.vocab_size
        check_token_ids(self.stop_token_ids, vocab_size, "stop_token_ids")
        check_token_ids([token_id for token_id, _ in self.logit_bias], vocab_size, "logit_bias")
        if self.min_tokens > max_tokens:
            message = f"Invalid 'min_tokens': an answer has {max_tokens} tokens at most, but got {self.min_tokens}."
            raise InvalidParameter(message, param="min_tokens")
        if (guide := self.guide) is not None:
            check_guide(guide)
        return GenerationParams(
            max_tokens=max_tokens,
            n=self.n,
            stop=self.stop_strings,
            sampling=self.sampling,
            grammar=guide and guide.grammar,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=self.stop_token_ids,
        )


def check_fields(fields: GenerationFields) -> None:
    """What no field can check alone. Raises InvalidRequest."""
    if fields.stream_options is not None and not fields.stream:
        message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
        raise InvalidParameter(message, param="stream_options", code=None)
    if len(guides := fields.guides) > 1:
        first, second = guides[0].param.partition(".")[0], guides[1].param.partition(".")[0]
        raise InvalidParameter(f"An answer is kept within one of '{first}' and '{second}', not both.", param=second)


def check_model(body: dict[str, JSON]) -> None:
    """OpenAI's own words for this one field."""
    if body.get("model") is None:
        raise InvalidRequest("you must provide a model parameter")


def check_guide(guide: Guide) -> None:
    """Raises InvalidGrammar with the parameter, and the part of its schema, that cannot be kept to."""
    from llmserve.engine.grammar import check

    try:
        check(guide.grammar)
    except InvalidGrammar as error:
        param = guide.param + error.path
        raise InvalidGrammar(f"Invalid '{param}': {error.message}", param=param) from None


def check_token_ids(token_ids: Any, vocab_size: int, param: str) -> None:
    for token_id in token_ids:
        if token_id >= vocab_size:
            message = f"Invalid '{param}': {token_id} is no token of this model. Its token ids are 0 to {vocab_size - 1}."
            raise InvalidParameter(message, param=param)
