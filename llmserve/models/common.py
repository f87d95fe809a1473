"""What a configuration and a file's header say of a model, whatever library runs it."""

from __future__ import annotations

from pathlib import Path

from llmserve.config import ModelSpec
from llmserve.engine.chat_template import ChatTemplate
from llmserve.engine.gguf import GGUFFile
from llmserve.engine.tokenizer import Tokenizer
from llmserve.engine.vocabulary import special_texts
from llmserve.errors import ModelFileError

DEFAULT_CONTEXT_LENGTH = 2048


def choose_context_length(spec: ModelSpec, path: Path, trained: int) -> int:
    """`trained` is the file's own, 0 if it does not say. Raises ModelFileError when more is asked for."""
    trained = trained or DEFAULT_CONTEXT_LENGTH
    if spec.context_length > trained:
        raise ModelFileError(
            f"{path.name} was trained for a context of {trained} tokens; context_length = {spec.context_length} is beyond it."
        )
    return spec.context_length or min(DEFAULT_CONTEXT_LENGTH, trained)


def make_chat_template(spec: ModelSpec, header: GGUFFile | None, tokenizer: Tokenizer) -> ChatTemplate:
    """The configured one, else the file's own."""
    source = spec.chat_template or (header.get("tokenizer.chat_template", str) if header is not None else None)
    return ChatTemplate(source, tokenizer.control_texts, special_texts(header.metadata) if header is not None else {})
