"""What every handler is given: the context of the application and the request it is to answer."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from werkzeug import Request as WerkzeugRequest

from llmserve.config import Config
from llmserve.engine.generation import ChoiceEnd, Delta, Event, GenerationEnd
from llmserve.registry import ModelRegistry
from llmserve.response_cache import ResponseCache

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from llmserve.api.chat import ParsedChat

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


@dataclass(frozen=True, slots=True)
class Context:
    """What handlers work with. Made once; everything in it is thread-safe."""

    config: Config
    registry: ModelRegistry
    cache: ResponseCache
    parse_chat: Callable[[bytes], ParsedChat]
    started: float = field(default_factory=time.monotonic)
    draining: threading.Event = field(default_factory=threading.Event)


class Request(WerkzeugRequest):
    """An HTTP request with an id, the moment it came (seconds of `time.monotonic`), and the record of its answer."""

    def __init__(self, environ: WSGIEnvironment) -> None:
        super().__init__(environ)
        self.received = time.monotonic()
        self.id = _request_id(environ.get("HTTP_X_REQUEST_ID", ""))
        self.record = Record()


@dataclass(slots=True)
class Record:
    """What the log says of an answer beside its status: counts and times, never text. Owned by the request's thread."""

    error: str | None = None
    model: str | None = None
    cache: str | None = None
    num_prompt_tokens: int | None = None
    num_cached_tokens: int | None = None
    num_output_tokens: int = 0
    ttft: float | None = None
    finish_reasons: list[str] = field(default_factory=list)

    def observe(self, events: Sequence[Event], seconds: float) -> None:
        """Note events that were read `seconds` after the request came."""
        if self.ttft is None and any(type(event) is Delta for event in events):
            self.ttft = seconds
        for event in [event for event in events if type(event) is not Delta]:
            if isinstance(event, ChoiceEnd):
                self.num_output_tokens += event.num_output_tokens
                self.finish_reasons.append(event.finish_reason)
            elif isinstance(event, GenerationEnd):
                self.num_prompt_tokens, self.num_cached_tokens = event.num_prompt_tokens, event.num_cached_tokens

    def __str__(self) -> str:
        text = "" if self.error is None else f" error={self.error}"
        if self.model is not None:
            text += f" model={self.model}"
        if self.cache is not None:
            text += f" cache={self.cache} output_tokens={self.num_output_tokens}"
        if self.num_prompt_tokens is not None:
            text += f" prompt_tokens={self.num_prompt_tokens} cached_tokens={self.num_cached_tokens}"
        if self.ttft is not None:
            text += f" ttft={self.ttft * 1000:.1f}ms"
        if self.finish_reasons:
            text += f" finish_reason={','.join(self.finish_reasons)}"
        return text


def _request_id(given: str) -> str:
    """The client's own id, when it can go into headers and logs as it is."""
    return given if _REQUEST_ID.fullmatch(given) else f"req_{os.urandom(12).hex()}"
