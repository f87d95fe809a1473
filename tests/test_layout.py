"""The layout is the architecture: an import points only to the right, and a library has one door."""

import ast
import functools
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "llmserve"
ORDER = [
    ("__main__",), ("cli",), ("gunicorn_conf", "wsgi"), ("server",), ("worker",), ("app",), ("api",), ("response_cache", "registry"), ("models",),
    ("config",), ("engine",), ("lru",), ("errors",), ("__init__",),
]  # fmt: skip
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
DOORS = {
    "werkzeug": ("app", "api/"),
    "gunicorn": ("server", "worker"),
    "ctransformers": ("engine/ctransformers_backend",),
    "llama_cpp": ("engine/llamacpp_",),
    "elftools": ("engine/matmul",),
    "llguidance": ("engine/grammar",),
    "jinja2": ("engine/chat_template",),
    "tokenizers": ("engine/tokenizer",),
    "huggingface_hub": ("models/sources",),
    "tomllib": ("config",),
}
FILES = sorted(PACKAGE.rglob("*.py"))


@functools.cache
def imports(path):
    """(module, names, line) of every import of a file, also those within functions and for type checking."""
    return tuple(_imports(path))


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, (), node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            yield node.module, tuple(alias.name for alias in node.names), node.lineno


def room(module, names):
    """The part of the package that an import reaches, if it is of the package."""
    parts = module.split(".")
    if parts[0] != "llmserve":
        return []
    if len(parts) > 1:
        return [parts[1]]
    return [name if name in RANK else "__init__" for name in names] or ["__init__"]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_imports_point_only_to_the_right(path):
    here = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if path.name == "__init__.py" and path.parent == PACKAGE:
        return  # its one import is lazy: the public name of the app
    for module, names, line in imports(path):
        for there in room(module, names):
            assert RANK[here] < RANK[there] or here == there, f"{path}:{line}: {here} imports {there}"


@pytest.mark.parametrize("library", DOORS)
def test_a_library_is_imported_through_its_door_only(library):
    for path in FILES:
        name = str(path.relative_to(PACKAGE).with_suffix(""))
        for module, _, line in imports(path):
            if module.split(".")[0] == library:
                assert name.startswith(DOORS[library]), f"{path}:{line} imports {library}"


def test_the_environment_is_read_by_config_only():
    for path in FILES:
        if path.name != "config.py":
            assert "os.environ" not in path.read_text(), path
            assert "getenv" not in path.read_text(), path
