"""Everything that can go wrong for a caller: one class per outcome, raised anywhere, rendered in one place.

A class carries the facts of its outcome (HTTP status, OpenAI's `type` and `code`); the message carries the numbers.
Knows nothing of HTTP libraries or models. The wording and the codes follow OpenAI's where it has one.
"""

from __future__ import annotations

from typing import Any


class APIError(Exception):
    """An outcome a client is told of, in OpenAI's error envelope.

    `param` names the request's field by its path ("messages[1].content"), `retry_after` is in seconds. Instances are
    values: picklable, and copied (`copy.copy`) before they are raised for another caller, for raising adds a traceback.
    """

    status = 500
    type = "server_error"
    code: str | None = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild without the constructor, whose arguments differ from class to class."""
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[APIError], args: tuple[Any, ...], attributes: dict[str, Any]) -> APIError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(attributes)
    return error


class InvalidRequest(APIError):
    """The request as a whole cannot be understood: its JSON, its form, its headers."""

    status = 400
    type = "invalid_request_error"
    code: str | None = None


class InvalidParameter(InvalidRequest):
    """One parameter is wrong; `code` says how (invalid_type, invalid_value, integer_below_min_value, …)."""

    def __init__(self, message: str, *, param: str, code: str | None = "invalid_value") -> None:
        super().__init__(message, param=param)
        self.code = code


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer do not fit the model's context; the message has both numbers."""

    code = "context_length_exceeded"


class TemplateError(InvalidRequest):
    """The model's chat template refused these messages; the message is the template's own."""

    code = "chat_template_error"


class InvalidGrammar(InvalidRequest):
    """A grammar or JSON schema that no answer can be kept within. `path` is the part of the schema, as ".properties.tags"."""

    code = "invalid_grammar"

    def __init__(self, message: str, *, path: str = "", param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.path = path


class InvalidAPIKey(InvalidRequest):
    status = 401
    code: str | None = "invalid_api_key"


class MissingAPIKey(InvalidAPIKey):
    code = None


class ForbiddenHost(InvalidRequest):
    """The Host header names another site: a page that rebinds its DNS name would reach us so."""

    status = 403
    code = "forbidden_host"


class ForbiddenOrigin(InvalidRequest):
    """A page of this origin may not change anything here."""

    status = 403
    code = "forbidden_origin"


class ModelNotFound(InvalidRequest):
    status = 404
    code = "model_not_found"

    def __init__(self, name: str) -> None:
        super().__init__(f"The model `{name}` does not exist or you do not have access to it.")


class UnknownURL(InvalidRequest):
    status = 404
    code = "unknown_url"


class MethodNotAllowed(InvalidRequest):
    status = 405
    code = "method_not_allowed"

    def __init__(self, message: str, *, allowed: tuple[str, ...]) -> None:
        super().__init__(message)
        self.allowed = allowed


class BodyTooLarge(InvalidRequest):
    status = 413
    code = "request_too_large"


class UnsupportedContentType(InvalidRequest):
    code = "unsupported_content_type"


class Unavailable(APIError):
    """Not now: the same request may succeed later, on this server or another."""

    status = 503


class QueueFull(Unavailable):
    """The model's waiting queue, or the server's thread pool, has no room."""

    code = "queue_full"


class ShuttingDown(Unavailable):
    code = "shutting_down"


class ModelLoadFailed(Unavailable):
    """The model could not be loaded; the message says why. Asking again does not help until its file changes."""

    code = "model_load_failed"


class MemoryBudgetExceeded(Unavailable):
    """The model does not fit into the memory budget beside the models that are busy."""

    code = "memory_budget_exceeded"


class EngineDied(Unavailable):
    """The process of the model's engine ended while it ran this request. It is started again."""

    code = "engine_died"


class DeadlineExceeded(APIError):
    """The answer took longer than the server allows one request."""

    status = 504
    code = "deadline_exceeded"


class EngineFailed(APIError):
    """The engine broke while it ran this request."""

    code = "engine_failed"


class ConfigError(Exception):
    """The configuration cannot be used. One sentence that names the key; it stops the start, and no client sees it."""


class ModelFileError(Exception):
    """A model file cannot be fetched, read, or run right. One sentence that says why; the registry makes it a load failure."""


class ModelCrashed(ModelFileError):
    """The library died of the file."""
