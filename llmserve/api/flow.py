"""A request's way from parsed to answered: look into the cache or submit, follow, render. The same for every endpoint that generates.

Knows prompts, events and formats only through what a `Call` says of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, Protocol

from llmserve.api import JSON
from llmserve.api.connection import LOOK_INTERVAL, Watch
from llmserve.api.context import Context, Request
from llmserve.api.render import Tally
from llmserve.api.responses import DONE, HeaderList, Response, encode, encoded_response, event_stream, frame, ignored_header
from llmserve.engine.generation import Delta, Event, Failed, Generation, GenerationEnd, GenerationParams
from llmserve.errors import ContextLengthExceeded, InvalidParameter, QueueFull
from llmserve.response_cache import Answer, Outcome

if TYPE_CHECKING:
    from llmserve.engine.chat_template import Segment
    from llmserve.engine.engine import Engine

_COSTLY_TO_COUNT = 256 * 1024  # characters; tokenizing takes a hundred times the text's memory for a moment


class Prompt(NamedTuple):
    """One prompt of a request. `key` lacks only the model; None is an answer that chance decides.

    `prepare` gives its token ids and parameters, or raises InvalidRequest.
    """

    key: bytes | None
    prepare: Callable[[Engine], tuple[list[int], GenerationParams]]


class Chunks(Protocol):
    """The chunks of a stream, made as events come."""

    tally: Tally
    ended: bool

    def begin(self) -> list[JSON]: ...

    def add(self, events: Iterable[Event]) -> list[JSON]: ...


class Format(Protocol):
    """How an endpoint writes down an answer. Choice k of prompt i comes as choice i * n + k."""

    def head(self, model_id: str, *, stream: bool) -> dict[str, JSON]:
        """What an answer, or each of its chunks, begins with."""
        ...

    def whole(self, events: Iterable[Event], tally: Tally) -> dict[str, JSON]:
        """An answer without its head, from all events of generations that ended well; counts them in `tally`."""
        ...

    def chunks(self, head: dict[str, JSON]) -> Chunks: ...


class Call(NamedTuple):
    """All that a body says, whatever model answers it: `n` choices of each prompt. Immutable, so it may be remembered."""

    model: str
    prompts: tuple[Prompt, ...]
    n: int
    stream: bool
    format: Format
    ignored: tuple[str, ...]  # fields that nothing knows


class _Rendering(NamedTuple):
    """What is kept with a remembered answer for those who want it whole."""

    rest: bytes
    tally: Tally


def respond(ctx: Context, request: Request, call: Call) -> Response:
    """The answer, whole or as a stream. All that a client can do wrong has been found when this returns."""
    server = ctx.config.server
    model_id = ctx.registry.resolve(call.model).id
    request.record.model = model_id
    if server.strict and call.ignored:
        name = call.ignored[0]
        raise InvalidParameter(f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")
    answers = _Answers(ctx, request, call, model_id)
    try:
        answers.open()
        request.record.cache = answers.outcome
        batches = answers.follow()
        headers = answers.headers() + ignored_header(call.ignored)
        if call.stream:
            # Waits for the first event or a moment of silence: an engine that fails at once still gets its status, and
            # a client that has to wait still gets its headers.
            batches = chain([next(batches)], batches)
            chunks = call.format.chunks(call.format.head(model_id, stream=True))
            request.record.tally = chunks.tally
            response = event_stream(request, _writes(chunks, batches), headers, server.ping_interval)
        else:
            head = encode(call.format.head(model_id, stream=False))
            rest = _rest(request, call, answers, batches)
            response = encoded_response(head[:-1] + b"," + rest[1:], headers=headers)
    except BaseException:
        answers.close()
        raise
    response.call_on_close(answers.close)  # also closes a stream that is never read, whose `finally` would never run
    return response


class _Answers:
    """The answers to the prompts of one request, read one after the other. Not thread-safe: the request's thread owns it.

    As many are begun as the model has slots, the others when those are done: a request with many prompts takes a place in
    the queue for each slot, and when there is none for the next prompt, that waits.
    """

    def __init__(self, ctx: Context, request: Request, call: Call, model_id: str) -> None:
        self._ctx = ctx
        self._record = request.record
        self._received = request.received
        self._call = call
        self._model_id = model_id
        self._watch = Watch(request.environ, request.received + ctx.config.server.request_timeout)
        directives = request.environ.get("HTTP_CACHE_CONTROL", "").lower()
        self._may_store = "no-store" not in directives
        self._may_lookup = self._may_store and "no-cache" not in directives
        self._open: dict[int, Answer] = {}  # by prompt
        self._num_slots = 1
        self.outcome: Outcome | None = None
        self.only: Answer | None = None  # the answer, if it is to be the only one

    def open(self) -> None:
        """Find or begin what can be begun now, after checking every prompt. Raises what a client should know first."""
        prompts = self._call.prompts
        if self._may_lookup:
            identity = self._ctx.registry.identity(self._model_id)
            for index, prompt in enumerate(prompts):
                if (answer := self._ctx.cache.find(_key(prompt, identity))) is not None:
                    self._open[index] = answer
        missing = [index for index in range(len(prompts)) if index not in self._open]
        if missing:
            with self._ctx.registry.use(self._model_id, self._watch) as engine:
                for index in missing[1:]:
                    prompts[index].prepare(engine)
                self._num_slots = engine.info.num_slots
                self._begin(missing[0], engine)
            self._begin_more(0)
        shown = self._open[missing[0] if missing else 0]
        self.outcome = shown.outcome
        self._age = shown.age
        self.only = shown if len(prompts) == 1 else None

    def headers(self) -> HeaderList:
        headers = [("X-Cache", str(self.outcome))]
        return headers if self._age is None else [*headers, ("Age", str(int(self._age)))]

    def follow(self) -> Iterator[list[Event]]:
        """The events in batches as they come, an empty batch after each LOOK_INTERVAL of silence. Raises what ends them early."""
        for index in range(len(self._call.prompts)):
            while not self._begin_more(index):
                time.sleep(LOOK_INTERVAL)  # the queue is full of others
                self._watch()
                yield []
            yield from self._follow(index, self._open[index])
            self._open[index].close()

    def close(self) -> None:
        for answer in self._open.values():
            answer.close()

    def _follow(self, index: int, answer: Answer) -> Iterator[list[Event]]:
        while not answer.ended:
            events = answer.read(LOOK_INTERVAL)
            if not answer.ended:
                self._watch()
            if self._record.ttft is None and events and isinstance(events[0], Delta):
                self._record.ttft = time.monotonic() - self._received
            if events and isinstance(events[-1], Failed):
                if events[:-1]:
                    yield self._of_prompt(index, events[:-1])
                raise copy(events[-1].error)
            yield self._of_prompt(index, events)

    def _of_prompt(self, index: int, events: list[Event]) -> list[Event]:
        """The events with the request's numbers of choices in the place of the prompt's own."""
        shift = index * self._call.n
        if not shift:
            return events
        return [
            event if isinstance(event, GenerationEnd | Failed) else event._replace(choice=event.choice + shift)
            for event in events
        ]

    def _begin_more(self, index: int) -> bool:
        """Begin the prompts from `index` on, as many as may run now; whether that one is among them."""
        for each in range(index, min(index + self._num_slots, len(self._call.prompts))):
            if each in self._open:
                continue
            try:
                with self._ctx.registry.use(self._model_id, self._watch) as engine:
                    self._begin(each, engine)
            except QueueFull:
                break
        return index in self._open

    def _begin(self, index: int, engine: Engine) -> None:
        prompt = self._call.prompts[index]
        key = _key(prompt, engine.info.identity)
        start = partial(_submit, prompt, engine)
        self._open[index] = self._ctx.cache.open(key, start, may_lookup=self._may_lookup, may_store=self._may_store)


def check_generates(engine: Engine) -> None:
    """Raises InvalidParameter for a model that makes vectors only."""
    if engine.vectors is not None:
        raise InvalidParameter(
            "This model makes embeddings, not text: it is for /v1/embeddings.", param="model", code="unsupported_value"
        )


def encode_prompt(engine: Engine, segments: Sequence[Segment], param: str) -> list[int]:
    """The ids of a prompt that fits the context by itself. Raises ContextLengthExceeded."""
    check_generates(engine)
    num_characters = sum(len(segment.text) for segment in segments)
    if num_characters > _COSTLY_TO_COUNT:
        check_length(num_characters // engine.tokenizer.max_piece_size, engine.context_length, param, "at least ")
    prompt_ids = engine.tokenizer.encode(segments)
    check_length(len(prompt_ids), engine.context_length, param)
    return prompt_ids


def extend(segments: tuple[Segment, ...], text: str) -> tuple[Segment, ...]:
    """A prompt that goes on with `text`."""
    from llmserve.engine.chat_template import Text

    if segments and isinstance(segments[-1], Text):
        return *segments[:-1], Text(segments[-1].text + text)
    return *segments, Text(text)


def check_length(num_prompt_tokens: int, context_length: int, param: str, qualifier: str = "") -> None:
    """Raises ContextLengthExceeded for a prompt, the parameter `param`, that does not fit by itself."""
    if num_prompt_tokens > context_length:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context_length} tokens. However, your {param} resulted in "
            f"{qualifier}{num_prompt_tokens} tokens. Please reduce the length of the {param}.",
            param=param,
        )


def choose_max_tokens(limit: int | None, num_prompt_tokens: int, context_length: int, param: str) -> int:
    """What one choice may take: what was asked for, else what the prompt leaves. Raises ContextLengthExceeded."""
    num_left = context_length - num_prompt_tokens
    wanted = max(num_left, 1) if limit is None else limit
    if wanted > num_left:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context_length} tokens. However, you requested "
            f"{num_prompt_tokens + wanted} tokens ({num_prompt_tokens} in the {param}, {wanted} in the completion). "
            f"Please reduce the length of the {param} or completion.",
            param=param,
        )
    return wanted


def _key(prompt: Prompt, identity: str | None) -> bytes | None:
    return None if prompt.key is None or identity is None else prompt.key + identity.encode()


def _submit(prompt: Prompt, engine: Engine) -> Generation:
    return engine.submit(*prompt.prepare(engine))


def _rest(request: Request, call: Call, answers: _Answers, batches: Iterator[list[Event]]) -> bytes:
    """The JSON of a whole answer but for its head. A repeated answer is rendered once; its length then costs nothing more."""
    rendering: _Rendering | None = None if answers.only is None else answers.only.rendering
    if rendering is None:
        tally = Tally()
        rest = call.format.whole(chain.from_iterable(batches), tally)
        rendering = _Rendering(encode(rest), tally)
        if answers.only is not None:
            answers.only.keep(rendering, len(rendering.rest))
    request.record.tally = rendering.tally
    return rendering.rest


def _writes(chunks: Chunks, batches: Iterator[list[Event]]) -> Iterator[bytes]:
    """What is to be written at once: the first chunks with the first batch, [DONE] with the last."""
    payloads = chunks.begin()
    for events in batches:
        payloads += chunks.add(events)
        yield b"".join(map(frame, payloads)) + (DONE if chunks.ended else b"")
        payloads = []
