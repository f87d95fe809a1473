"""Handlers: JSON over HTTP in, engine calls out. Knows OpenAI's wire format; knows nothing of KV caches."""

from typing import Any

JSON = Any
"""A JSON value."""
