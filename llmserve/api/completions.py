"""POST /v1/completions: text in, text out; the prompt's own probabilities too, which is how models are scored."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from llmserve import response_cache
from llmserve.api import JSON, body, flow, render
from llmserve.api.context import Context, Request
from llmserve.api.fields import Boolean, Integer, PromptForms, String, optional
from llmserve.api.flow import Call, Prompt
from llmserve.api.parameters import INT32_MAX, GenerationFields, check_fields, check_model, check_token_ids
from llmserve.api.render import Choice, ChunkStream, Tally, logprob
from llmserve.api.responses import Response
from llmserve.engine.generation import ChoiceEnd, Delta, Event, GenerationParams, PromptScores, TokenScore
from llmserve.errors import InvalidParameter

if TYPE_CHECKING:
    from llmserve.engine.chat_template import Segment
    from llmserve.engine.engine import Engine

_DEFAULT_MAX_TOKENS = 16
_MAX_PROMPTS = 2048
_START_TEXT = "<|endoftext|>"  # what OpenAI's models take for the start of a text

PromptText = str | tuple[int, ...]


class CompletionRequest(GenerationFields):
    """The body of POST /v1/completions."""

    prompt: tuple[PromptText, ...] = optional(PromptForms(_MAX_PROMPTS, INT32_MAX), ("",))
    max_tokens: int | None = optional(Integer(0, INT32_MAX))
    best_of: int | None = optional(Integer(1, 20))
    echo: bool = optional(Boolean(), False)
    logprobs: int | None = optional(Integer(0, 5))
    suffix: str | None = optional(String())

    @property
    def num_made(self) -> int:
        """Choices made of each prompt, of which the `n` likeliest are shown."""
        return self.best_of or self.n

    @property
    def scores_prompt(self) -> bool:
        """Whether the engine is asked for the prompt's tokens: with their scores, or because ids are to be shown as text."""
        return self.echo and (self.logprobs is not None or any(not isinstance(text, str) for text in self.prompt))

    @property
    def shape(self) -> tuple[Any, ...]:
        return *super().shape, self.max_tokens, self.num_made, self.echo, self.logprobs, self.suffix

    def params(self, max_tokens: int, engine: Engine) -> GenerationParams:
        logprobs = 0 if self.logprobs is None and self.num_made > self.n else self.logprobs
        params = super().params(max_tokens, engine)
        return params._replace(n=self.num_made, logprobs=logprobs, prompt_logprobs=self.scores_prompt)


def parse(data: bytes) -> Call:
    """Raises InvalidRequest."""
    fields = body.parse_object(data)
    check_model(fields)
    ignored: list[str] = []
    completion = CompletionRequest.parse(fields, "", ignored)
    check_fields(completion)
    _check_best_of(completion)
    prompts = tuple(_prompt(completion, text) for text in completion.prompt)
    return Call(completion.model, prompts, completion.num_made, completion.stream, CompletionFormat(completion), tuple(ignored))


def create(ctx: Context, request: Request) -> Response:
    """Complete one prompt or several, whole or as a stream."""
    return flow.respond(ctx, request, parse(body.read(request, ctx.config.server.max_body_size)))


def _check_best_of(completion: CompletionRequest) -> None:
    if completion.num_made < completion.n:
        message = f"Invalid 'best_of': expected a value >= n, but got {completion.num_made}, and n is {completion.n}."
        raise InvalidParameter(message, param="best_of")
    if completion.stream and completion.num_made > completion.n:
        raise InvalidParameter("Invalid 'best_of': the best of several answers cannot be streamed.", param="best_of")


def _prompt(completion: CompletionRequest, text: PromptText) -> Prompt:
    return Prompt(
        response_cache.key(completion.sampling, "completion", text, completion.shape), partial(_prepare, completion, text)
    )


def _prepare(completion: CompletionRequest, text: PromptText, engine: Engine) -> tuple[list[int], GenerationParams]:
    flow.check_generates(engine)
    if isinstance(text, str):
        prompt_ids = flow.encode_prompt(engine, _segments(completion, text, engine), "prompt")
    elif completion.suffix:
        raise InvalidParameter("Invalid 'suffix': it goes with a prompt that is text, not token ids.", param="suffix")
    else:
        prompt_ids = list(text)
        check_token_ids(text, engine.tokenizer.vocab_size, "prompt")
        flow.check_length(len(prompt_ids), engine.context_length, "prompt")
    prompt_ids = prompt_ids or [_start_id(engine)]
    limit = completion.max_tokens
    if limit is None:
        limit = min(_DEFAULT_MAX_TOKENS, max(engine.context_length - len(prompt_ids), 1))
    return prompt_ids, completion.params(
        flow.choose_max_tokens(limit, len(prompt_ids), engine.context_length, "prompt"), engine
    )


def _start_id(engine: Engine) -> int:
    """What stands for an empty prompt. Raises InvalidParameter."""
    tokenizer = engine.tokenizer
    start = tokenizer.control_texts.get(_START_TEXT) if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise InvalidParameter("This model has no token that begins a text: the prompt must not be empty.", param="prompt")
    return start


def _segments(completion: CompletionRequest, text: str, engine: Engine) -> tuple[Segment, ...]:
    from llmserve.engine import infill
    from llmserve.engine.chat_template import Text

    if not completion.suffix:
        return (Text(text),) if text else ()
    segments = infill.render(text, completion.suffix, engine.tokenizer.control_texts)
    if segments is None:
        message = "Unsupported parameter: 'suffix' needs a model with tokens for what stands before and behind a gap; this one has none."
        raise InvalidParameter(message, param="suffix", code="unsupported_parameter")
    return segments


class CompletionFormat:
    """How completions are written down: a choice has text, and its logprobs in four lists."""

    def __init__(self, completion: CompletionRequest) -> None:
        self._completion = completion
        self._prompts = completion.prompt

    def head(self, model_id: str, *, stream: bool) -> dict[str, JSON]:
        return render.head("cmpl", "text_completion", model_id)

    def whole(self, events: Iterable[Event], tally: Tally) -> dict[str, JSON]:
        made, shown = self._completion.num_made, self._completion.n
        choices = render.gather(made * len(self._prompts), events, tally)
        written = []
        for number, prompt in enumerate(self._prompts):
            of_prompt = choices[number * made : (number + 1) * made]
            prompt_tokens = of_prompt[0].prompt_tokens
            best = sorted(of_prompt, key=_mean_logprob, reverse=True)[:shown] if made > shown else of_prompt
            for index, choice in enumerate(best, number * shown):
                written.append(self._choice(index, prompt, prompt_tokens, choice))
        return {"choices": written, "usage": tally.usage()}

    def chunks(self, head: dict[str, JSON]) -> ChunkStream:
        completion, num_prompts = self._completion, len(self._prompts)
        writer = _CompletionWriter(completion, self._prompts)
        return ChunkStream(head, completion.n * num_prompts, completion.include_usage, writer, num_prompts)

    def _choice(self, index: int, prompt: PromptText, prompt_tokens: tuple[TokenScore, ...], choice: Choice) -> JSON:
        completion = self._completion
        echoed = _echo(completion, prompt, prompt_tokens)
        offset = 0 if completion.echo else _length(prompt)
        logprobs = None if completion.logprobs is None else _logprobs((*prompt_tokens, *choice.tokens), offset)
        return {"index": index, "text": echoed + choice.text, "logprobs": logprobs, "finish_reason": choice.finish_reason}


class _CompletionWriter:
    """Chunks of completions. What comes before the prompt's scores, where those are asked for, waits for them."""

    def __init__(self, completion: CompletionRequest, prompts: tuple[PromptText, ...]) -> None:
        self._completion = completion
        self._prompts = prompts
        self._offsets = [0 if completion.echo else _length(prompt) for prompt in prompts for _ in range(completion.n)]
        self._held: dict[int, list[Event]] = {index: [] for index in range(len(prompts))} if completion.scores_prompt else {}

    def first(self, index: int) -> list[JSON]:
        prompt = self._prompts[index // self._completion.n]
        shown = isinstance(prompt, str) and self._completion.echo and not self._completion.scores_prompt
        return [self._choice(index, str(prompt))] if shown else []

    def more(self, event: Event) -> list[JSON]:
        assert isinstance(event, PromptScores | Delta | ChoiceEnd)
        number = event.choice // self._completion.n
        if isinstance(event, PromptScores):
            text = _echo(self._completion, self._prompts[number], event.tokens)
            indices = range(number * self._completion.n, (number + 1) * self._completion.n)
            prompts = [self._choice(index, text, event.tokens) for index in indices]
            return prompts + [choice for held in self._held.pop(number) for choice in self.more(held)]
        if number in self._held:
            self._held[number].append(event)
            return []
        if isinstance(event, Delta):
            return [self._choice(event.choice, event.text, event.tokens)]
        return [self._choice(event.choice, "", (), event.finish_reason)]

    def _choice(self, index: int, text: str, tokens: tuple[TokenScore, ...] = (), finish_reason: str | None = None) -> JSON:
        logprobs = None
        if self._completion.logprobs is not None and tokens:
            logprobs = _logprobs(tokens, self._offsets[index])
        self._offsets[index] += len(text)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _echo(completion: CompletionRequest, prompt: PromptText, tokens: tuple[TokenScore, ...]) -> str:
    """The prompt as text, if that is asked for."""
    if not completion.echo:
        return ""
    return prompt if isinstance(prompt, str) else b"".join(token.piece for token in tokens).decode("utf-8", "replace")


def _length(prompt: PromptText) -> int:
    return len(prompt) if isinstance(prompt, str) else 0


def _mean_logprob(choice: Choice) -> float:
    logprobs = [token.logprob or 0.0 for token in choice.tokens]
    return sum(logprobs) / len(logprobs) if logprobs else 0.0


def _logprobs(tokens: tuple[TokenScore, ...], offset: int) -> JSON:
    """Four lists of equal length; `offset` is where the first token begins, in characters."""
    names = [_name(token.piece) for token in tokens]
    lengths = [len(token.piece.decode("utf-8", "ignore")) for token in tokens]
    return {
        "tokens": names,
        "token_logprobs": [logprob(token.logprob) for token in tokens],
        "top_logprobs": [_alternatives(token) for token in tokens],
        "text_offset": list(accumulate(lengths[:-1], initial=offset)),
    }


def _alternatives(token: TokenScore) -> JSON:
    """By name, the token itself among them."""
    if token.logprob is None:
        return None
    return {_name(piece): logprob(value) for piece, value in (*token.top, (token.piece, token.logprob))}


def _name(piece: bytes) -> str:
    """A token that is no text by itself is named by its bytes, as "bytes:\\xe2\\x82"."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{value:02x}" for value in piece)
