"""/tokenize, /detokenize and /apply-template: what a prompt is made of."""

from __future__ import annotations

from llmserve.api import JSON, body, chat, schema
from llmserve.api.connection import Watch
from llmserve.api.context import Context, Request
from llmserve.api.fields import Array, Boolean, Integer, String, Struct, optional, required
from llmserve.api.parameters import INT32_MAX, check_token_ids
from llmserve.api.responses import Response, ignored_header, json_response
from llmserve.engine.tokenizer import Tokenizer
from llmserve.errors import InvalidParameter


class TokenizeRequest(Struct):
    """`prompt`, or `content` as llama-server calls it; or `messages`, of which a chat's prompt is made first."""

    model: str = required(String())
    prompt: str | None = optional(String())
    content: str | None = optional(String())
    messages: tuple[schema.Message, ...] | None = optional(Array(schema.MESSAGE, 1))
    add_special_tokens: bool = optional(Boolean(), True)
    with_pieces: bool = optional(Boolean(), False)


class DetokenizeRequest(Struct):
    model: str = required(String())
    tokens: tuple[int, ...] = required(Array(Integer(0, INT32_MAX)))


def tokenize(ctx: Context, request: Request) -> Response:
    """Token ids of a text, as ordinary text, or of a chat's prompt."""
    parsed, ignored = _body(ctx, request)
    asked = TokenizeRequest.parse(parsed, "", ignored)
    text = asked.content if asked.prompt is None else asked.prompt
    if (text is None) == (asked.messages is None):
        raise InvalidParameter("Exactly one of 'prompt' and 'messages' must be given.", param="prompt")
    with ctx.registry.use(_resolve(ctx, request, asked.model), _watch(ctx, request)) as engine:
        tokenizer = engine.tokenizer
        if text is None:
            chat_request, _ = schema.parse_chat(parsed)
            messages = [message.for_template() for message in chat_request.messages]
            token_ids = tokenizer.encode(chat.render_prompt(engine, chat_request, messages, chat_request.tool_use()))
        else:
            token_ids = tokenizer.encode_text(text)
            if asked.add_special_tokens and tokenizer.add_bos and tokenizer.bos_token_id is not None:
                token_ids = [tokenizer.bos_token_id, *token_ids]
        answer: dict[str, JSON] = {"tokens": token_ids, "count": len(token_ids), "max_model_len": engine.context_length}
        if asked.with_pieces:
            answer["pieces"] = [_piece(tokenizer, token_id) for token_id in token_ids]
    return json_response(answer, headers=ignored_header(ignored))


def detokenize(ctx: Context, request: Request) -> Response:
    """The text of token ids; control tokens have none."""
    parsed, ignored = _body(ctx, request)
    asked = DetokenizeRequest.parse(parsed, "", ignored)
    with ctx.registry.use(_resolve(ctx, request, asked.model), _watch(ctx, request)) as engine:
        check_token_ids(asked.tokens, engine.tokenizer.vocab_size, "tokens")
        text = b"".join(map(engine.tokenizer.piece, asked.tokens)).decode("utf-8", "replace")
    return json_response({"prompt": text, "content": text}, headers=ignored_header(ignored))


def apply_template(ctx: Context, request: Request) -> Response:
    """The prompt that the body of a chat makes."""
    parsed, _ = _body(ctx, request)
    asked, ignored = schema.parse_chat(parsed)
    messages = [message.for_template() for message in asked.messages]
    with ctx.registry.use(_resolve(ctx, request, asked.model), _watch(ctx, request)) as engine:
        segments = chat.render_prompt(engine, asked, messages, asked.tool_use())
    return json_response({"prompt": "".join(segment.text for segment in segments)}, headers=ignored_header(ignored))


def _body(ctx: Context, request: Request) -> tuple[dict[str, JSON], list[str]]:
    return body.parse_object(body.read(request, ctx.config.server.max_body_size)), []


def _resolve(ctx: Context, request: Request, name: str) -> str:
    request.record.model = ctx.registry.resolve(name).id
    return request.record.model


def _watch(ctx: Context, request: Request) -> Watch:
    return Watch(request.environ, request.received + ctx.config.server.request_timeout)


def _piece(tokenizer: Tokenizer, token_id: int) -> JSON:
    """The token's text, or its bytes where they are none by themselves."""
    piece = tokenizer.piece(token_id)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)
