"""What schemathesis is told beside the OpenAPI document: how fields go together, and how a stream ends.

SCHEMATHESIS_HOOKS names this module.
"""

import json
import re
import zlib

import schemathesis

from tests.programs.conftest import EMBEDDER, TINY

VOCABULARY_SIZE = 300  # the model has some more tokens

GUIDES = ("response_format", "regex", "choice", "grammar")
REFUSALS = [
    # Fields that need each other, or exclude each other.
    r"is kept within one of",
    r"is only allowed when",
    r"is not among the tools",
    r"Exactly one of 'prompt' and 'messages'",
    r"Invalid 'best_of'",
    r"cannot be streamed",
    r"an answer has \d+ tokens at most",
    r"messages with role 'tool' must be a response",
    r"With 'continue_final_message' the last message must be",
    r"is a parameter of its own and cannot be set in 'chat_template_kwargs'",
    # What depends on the model.
    r"This model's maximum context length is",
    r"is no token of this model",
    r"has no token that begins a text",
    r"needs a model with tokens for what stands before and behind a gap",
    r"makes text\.|makes embeddings, not text",
    r"Nothing that this model can write begins as the grammar wants",
    r"the model's vectors have \d+ dimensions",
    r"chat template",
    # Languages of their own.
    r"Invalid '(regex|grammar|choice|response_format|tools|functions)",
    # JSON Schema's integers may be written with a fraction.
    r"but got a decimal instead",
    # Longer than any schema of one field says.
    r"more than \d+ tokens together",
]
"""Why a body that keeps to the schema may be refused all the same."""


@schemathesis.hook
def before_call(context, case, kwargs):
    """Every second body that keeps to the schema has fields that go together, so that it is answered."""
    if _is_positive(case) and isinstance(case.body, dict) and zlib.crc32(json.dumps(case.body).encode()) % 2:
        case.body = _untangled(case.body, case.path)


@schemathesis.check
def refusals_have_a_reason(ctx, response, case):
    """What the schema allows is refused only for what no schema of single fields can say."""
    if not _is_positive(case) or response.status_code != 400:
        return
    message = response.json()["error"]["message"]
    assert any(re.search(reason, message) for reason in REFUSALS), f"refused without a reason that the schema lacks: {message}"


@schemathesis.check
def streams_end_well(ctx, response, case):
    """The last event says that it is the last. (What each carries, schemathesis holds against the document by itself.)"""
    if "text/event-stream" in response.headers.get("content-type", [""])[0]:
        last = response.content.decode().rstrip("\n").rpartition("\n")[2]
        assert last == "data: [DONE]", f"the stream ends with {last}"


def _is_positive(case):
    return case.meta is not None and case.meta.generation.mode.is_positive


def _untangled(body, path):
    """The body, with fields that exclude others or depend on the model left out or made to fit."""
    left_out = [name for name in GUIDES if body.get(name) is not None][1:]
    left_out += ["tool_choice", "function_call", "best_of", "min_tokens", "suffix", "dimensions", "continue_final_message"]
    left_out += ["chat_template_kwargs", "content"] + ["stream_options"] * (not body.get("stream"))
    left_out += ["top_logprobs"] * (not body.get("logprobs")) + ["messages"] * (path == "/tokenize" and "prompt" in body)
    kept = {name: value for name, value in body.items() if name not in left_out}
    kept["model"] = EMBEDDER if path == "/v1/embeddings" else TINY
    for name in ("stop_token_ids", "tokens"):
        if kept.get(name):
            kept[name] = [token_id % VOCABULARY_SIZE for token_id in kept[name]]
    if kept.get("logit_bias"):
        kept["logit_bias"] = {str(int(token_id) % VOCABULARY_SIZE): bias for token_id, bias in kept["logit_bias"].items()}
    if kept.get("messages"):
        kept["messages"] = [m for m in kept["messages"] if m["role"] != "tool"] or [{"role": "user", "content": "Hello"}]
    return kept
