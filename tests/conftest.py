"""What holds for every test."""

import gc

from llmserve.engine import matmul

matmul.process.claim()  # as in a server's process: nothing but the engines uses llama.cpp here

_MARKERS = {"models": ("slow",), "e2e": ("slow",), "faults": ("slow", "faults"), "programs": ("slow", "programs")}
"""Of all tests in a folder."""


def pytest_collection_modifyitems(items):
    for item in items:
        for marker in _MARKERS.get(item.path.parent.name, ()):
            item.add_marker(marker)


def pytest_collection_finish():
    """Opening and closing a model collects garbage: without the hundred thousands of objects that are the tests themselves."""
    gc.collect()
    gc.freeze()
