"""OpenAI-compatible LLM inference server inside Python's own web stack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmserve.app import create_app

__all__ = ["__version__", "create_app"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `create_app` when it is asked for: its imports would slow down everything that needs no web server."""
    if name != "create_app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llmserve.app import create_app

    return create_app
