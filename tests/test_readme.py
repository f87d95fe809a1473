"""The README's tables and tree are the code's."""

import inspect
import json
import re
from dataclasses import fields
from pathlib import Path

import openai
import pytest
from openai.resources.chat.completions import AsyncCompletions, Completions

from llmserve.api.completions import CompletionRequest
from llmserve.api.embeddings import EmbeddingsRequest
from llmserve.api.fields import Unsupported
from llmserve.api.schema import ChatRequest
from llmserve.config import CacheConfig, ModelSpec, ServerConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLES = {"[server]": ServerConfig, "[cache]": CacheConfig, "[[models]]": ModelSpec}


def option_rows():
    """The rows of the README's configuration tables, from the configuration's own fields."""
    rows = {}
    for table, cls in TABLES.items():
        rows[table] = [
            f"| `{option.name}` | {'' if option.name in ('id', 'source') else _shown(option)} | {option.metadata['doc']} |"
            for option in fields(cls)
        ]
    return rows


def _shown(option):
    default = list(option.default) if isinstance(option.default, tuple) else option.default
    if isinstance(default, float) and default.is_integer():
        default = int(default)
    if option.name in ("max_body_size", "max_bytes"):
        default = f"{default // 1024**2}MiB"
    return f"`{json.dumps(default)}`"


@pytest.mark.parametrize("table", TABLES)
def test_every_option_is_in_the_readme_with_its_default(table):
    for row in option_rows()[table]:
        assert row in README, row


def test_the_tree_has_a_line_for_every_module():
    tree = README.split("```\nllmserve/")[1].split("```")[0]
    for path in sorted((ROOT / "llmserve").rglob("*.py")):
        if path.name != "__init__.py":
            assert re.search(rf"^ +{path.name} +\S", tree, re.MULTILINE), path


def test_the_tree_names_no_file_that_is_not_there():
    tree = README.split("```\nllmserve/")[1].split("```")[0]
    names = {path.name for path in (ROOT / "llmserve").rglob("*.py")}
    assert set(re.findall(r"^ +(\w+\.py) ", tree, re.MULTILINE)) <= names


BODIES = {
    "/v1/chat/completions": (ChatRequest, Completions.create, AsyncCompletions.create),
    "/v1/completions": (CompletionRequest, openai.resources.Completions.create, openai.resources.AsyncCompletions.create),
    "/v1/embeddings": (EmbeddingsRequest, openai.resources.Embeddings.create, openai.resources.AsyncEmbeddings.create),
}
NOT_IN_THE_BODY = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}


def parameter_rows():
    """The rows of the README's table of parameters, from the parsers of requests."""
    kinds = {"honoured": [], "checked, without effect": [], "refused": []}
    for body, _, _ in BODIES.values():
        fields_of = {kind: [] for kind in kinds}
        for name, field in body.declared.items():
            refused = isinstance(field.parser, Unsupported)
            fields_of["refused" if refused else "checked, without effect" if field.passive else "honoured"].append(name)
        for kind, names in fields_of.items():
            kinds[kind].append(", ".join(f"`{name}`" for name in names))
    return [f"| {kind} | {' | '.join(columns)} |" for kind, columns in kinds.items()]


def test_every_parameter_is_in_the_readme_with_what_is_done_about_it():
    for row in parameter_rows():
        assert row in README, row


@pytest.mark.parametrize("path", BODIES)
def test_every_parameter_of_the_official_client_is_known(path):
    body, *methods = BODIES[path]
    for method in methods:
        sent = inspect.signature(method).parameters.keys() - NOT_IN_THE_BODY
        assert len(sent) >= 5
        assert sent <= body.declared.keys()
