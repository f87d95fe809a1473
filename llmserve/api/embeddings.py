"""POST /v1/embeddings: texts or token ids in, one vector for each out."""

from __future__ import annotations

import base64
from copy import copy
from typing import TYPE_CHECKING

import numpy as np

from llmserve.api import JSON, body, flow
from llmserve.api.connection import LOOK_INTERVAL, Watch
from llmserve.api.context import Context, Request
from llmserve.api.fields import Integer, OneOf, PromptForms, String, Struct, optional, passive, required
from llmserve.api.parameters import INT32_MAX, check_model, check_token_ids
from llmserve.api.responses import Response, ignored_header, json_response
from llmserve.engine.generation import Embedding, Failed, Generation, GenerationEnd
from llmserve.errors import InvalidParameter

if TYPE_CHECKING:
    from llmserve.engine.engine import Engine, Vectors

_MAX_TEXTS = 2048
_MAX_TOKENS = 300_000  # of all texts together


class EmbeddingsRequest(Struct):
    """The body of POST /v1/embeddings."""

    model: str = required(String())
    input: tuple[str | tuple[int, ...], ...] = required(PromptForms(_MAX_TEXTS, INT32_MAX, min_length=1))
    encoding_format: str = optional(OneOf(("float", "base64")), "float")
    dimensions: int | None = optional(Integer(1, INT32_MAX))
    user: str | None = passive(String())


def create(ctx: Context, request: Request) -> Response:
    """The vectors of all texts, in their order."""
    server = ctx.config.server
    parsed = body.parse_object(body.read(request, server.max_body_size))
    check_model(parsed)
    ignored: list[str] = []
    asked = EmbeddingsRequest.parse(parsed, "", ignored)
    model_id = ctx.registry.resolve(asked.model).id
    request.record.model = model_id
    watch = Watch(request.environ, request.received + server.request_timeout)
    with ctx.registry.use(model_id, watch) as engine:
        vectors = _vectors(engine, model_id)
        _check_dimensions(asked, vectors.dimensions)
        generation = engine.embed(_encode(engine, vectors, asked.input))
    try:
        made, end = _read(generation, watch)
    finally:
        generation.close()
    data = [{"object": "embedding", "index": index, "embedding": _write(vector, asked)} for index, vector in enumerate(made)]
    usage = {"prompt_tokens": end.num_prompt_tokens, "total_tokens": end.num_prompt_tokens}
    return json_response({"object": "list", "data": data, "model": model_id, "usage": usage}, headers=ignored_header(ignored))


def _vectors(engine: Engine, model_id: str) -> Vectors:
    """Raises InvalidParameter for a model that makes text."""
    if engine.vectors is None:
        raise InvalidParameter(
            f'The model `{model_id}` makes text. A [[models]] table with task = "embed" would make vectors of its file.',
            param="model",
            code="unsupported_value",
        )
    return engine.vectors


def _check_dimensions(asked: EmbeddingsRequest, most: int) -> None:
    if asked.dimensions is not None and asked.dimensions > most:
        raise InvalidParameter(
            f"Invalid 'dimensions': the model's vectors have {most} dimensions. Expected a value <= {most}, "
            f"but got {asked.dimensions} instead.",
            param="dimensions",
            code="integer_above_max_value",
        )


def _encode(engine: Engine, vectors: Vectors, texts: tuple[str | tuple[int, ...], ...]) -> list[list[int]]:
    """Token ids of each text. Raises InvalidParameter, and ContextLengthExceeded for one that is too long."""
    paths = [f"input[{index}]" if len(texts) > 1 else "input" for index in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        if isinstance(text, str):
            flow.check_length(len(text) // engine.tokenizer.max_piece_size, engine.context_length, path, "at least ")
        else:
            check_token_ids(text, engine.tokenizer.vocab_size, path)
    strings = [text for text in texts if isinstance(text, str)]
    of_strings = iter(vectors.encode(strings) if strings else [])
    encoded = [next(of_strings) if isinstance(text, str) else list(text) for text in texts]
    for path, token_ids in zip(paths, encoded, strict=True):
        flow.check_length(len(token_ids), engine.context_length, path)
        if not token_ids:
            raise InvalidParameter(f"Invalid '{path}': the text has no token of this model.", param=path)
    if sum(map(len, encoded)) > _MAX_TOKENS:
        raise InvalidParameter(f"The inputs have more than {_MAX_TOKENS} tokens together.", param="input")
    return encoded


def _read(generation: Generation, watch: Watch) -> tuple[list[bytes], GenerationEnd]:
    """All vectors. Raises what ends them early."""
    vectors: list[bytes] = []
    cursor = 0
    while True:
        events = generation.read(cursor, LOOK_INTERVAL)
        cursor += len(events)
        for event in events:
            if isinstance(event, Embedding):
                vectors.append(event.vector)
            elif isinstance(event, GenerationEnd):
                return vectors, event
            elif isinstance(event, Failed):
                raise copy(event.error)
        watch()


def _write(vector: bytes, asked: EmbeddingsRequest) -> JSON:
    """As floats or base64 of them; fewer dimensions are the first ones, at length 1 again."""
    values = np.frombuffer(vector, "<f4")
    if asked.dimensions is not None:
        values = values[: asked.dimensions]
        length = np.linalg.norm(values.astype(np.float64))
        values = values if length == 0 else (values / length).astype("<f4")
    return base64.b64encode(values.tobytes()).decode() if asked.encoding_format == "base64" else values.tolist()
