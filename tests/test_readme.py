"""The README's tables and tree are the code's."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

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
