"""What every handler is given: the context of the application and the request it is to answer."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass, field
from random import getrandbits
from typing import TYPE_CHECKING

from werkzeug import Request as WerkzeugRequest

from llmserve.config import Config
from llmserve.registry import ModelRegistry
from llmserve.response_cache import ResponseCache

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from llmserve.api.render import Tally

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


@dataclass(frozen=True, slots=True)
class Context:
    """What handlers work with. Made once; everything in it is thread-safe."""

    config: Config
    registry: ModelRegistry
    cache: ResponseCache
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
    ttft: float | None = None  # seconds
    tally: Tally | None = None

    def __str__(self) -> str:
        text = "" if self.error is None else f" error={self.error}"
        if self.model is not None:
            text += f" model={self.model}"
        if self.cache is not None:
            text += f" cache={self.cache}"
        if (tally := self.tally) is not None and tally.finish_reasons:
            text += f" output_tokens={tally.num_output_tokens} prompt_tokens={tally.num_prompt_tokens}"
            text += f" cached_tokens={tally.num_cached_tokens} finish_reason={','.join(tally.finish_reasons)}"
        if self.ttft is not None:
            text += f" ttft={self.ttft * 1000:.1f}ms"
        return text


def unique() -> str:
    """An id nobody else has. Not a secret, so it takes no system call, which would give the GIL away."""
    return f"{getrandbits(96):024x}"


def _request_id(given: str) -> str:
    """The client's own id, when it can go into headers and logs as it is."""
    return given if given and _REQUEST_ID.fullmatch(given) else f"req_{unique()}"
