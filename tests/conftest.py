"""What holds for every test."""

import gc


def pytest_collection_finish():
    """Opening and closing a model collects garbage: without the hundred thousands of objects that are the tests themselves."""
    gc.collect()
    gc.freeze()
