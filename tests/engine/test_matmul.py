"""The ways of ggml: when they may change, and that they change no score."""

import json
import platform
import subprocess
import sys
import threading

import gguf
import pytest

from llmserve.engine.matmul import MatMul
from tests import tiny_models

COMPARE = """
import json, sys
from pathlib import Path
from llmserve.engine import matmul
from llmserve.engine.backend import Piece
from llmserve.engine.llamacpp_backend import LlamaCppBackend, LlamaCppSettings

def scores(path):
    backend = LlamaCppBackend(Path(path), 256, 8, 64, LlamaCppSettings(flash_attention="on", exact_tiles=True))
    passes = []
    for pieces in (
        [Piece(0, 0, list(range(5, 55)), True)],
        [Piece(number, 0, [9 + number] * 3, True) for number in range(1, 8)],
        [Piece(number, 3, [9 + number], True) for number in range(1, 8)],
        [Piece(0, 50, [7], True)],
        [Piece(0, 51, [7, 8, 9, 10], True, wants_all=True)],
    ):
        backend.forward(pieces, 2)
        passes += [backend.logits(index).tobytes().hex() for index in range(len(pieces))]
    backend.close()
    return passes

ways = matmul.process
before = scores(sys.argv[1])
untouched = ways._entries is None
ways.claim()
after = scores(sys.argv[1])
taken = {name: entry._value.value != entry._own for name, entry in ways._entries.items()}
print(json.dumps([untouched, before == after, len(set(before)), taken]))
"""


class Entry:
    """What stands in the table, without a library."""

    def __init__(self):
        self.history = []

    def set(self, other):
        self.history.append(other)


@pytest.fixture
def ways(monkeypatch):
    entries = {"ggml_is_numa": Entry(), "llamafile_sgemm": Entry()}
    monkeypatch.setattr("llmserve.engine.matmul._find_entries", lambda function: entries)
    made = MatMul()
    made.entries = entries
    return made


def passes(ways, *tiles, threads=2):
    for each in tiles:
        with ways.passing(threads, tiles=each):
            pass
    return ways.entries["llamafile_sgemm"].history


def test_nothing_is_touched_in_a_process_that_others_share(ways):
    ways.open(print, exact_tiles=True)
    assert passes(ways, False, True) == []


def test_a_pass_has_the_way_that_it_asks_for(ways):
    ways.claim()
    ways.open(print, exact_tiles=True)
    assert passes(ways, False, True) == [True, False]


def test_nothing_is_chosen_for_a_model_that_must_be_run_plainly(ways):
    ways.claim()
    ways.open(None, exact_tiles=True)
    assert passes(ways, False) == []


def test_rows_are_divided_evenly_among_few_threads_only(ways):
    ways.claim()
    ways.open(print, exact_tiles=True)
    for threads in (1, 4, 5):
        passes(ways, True, threads=threads)
    assert ways.entries["ggml_is_numa"].history == [True, True, False]


def test_all_passes_have_tiles_while_one_model_is_rounded_by_them(ways):
    ways.claim()
    ways.open(print, exact_tiles=True)
    ways.open(print, exact_tiles=False)
    passes(ways, False)
    ways.close(exact_tiles=False)
    assert passes(ways, False) == [False, True]


def test_nothing_changes_while_a_pass_is_under_way(ways):
    ways.claim()
    ways.open(print, exact_tiles=True)
    with ways.passing(2, tiles=False):
        assert passes(ways, True) == [True]
    assert passes(ways, True) == [True, False]


def test_a_model_comes_between_two_passes(ways):
    ways.claim()
    ways.open(print, exact_tiles=True)
    opened = threading.Event()

    def come():
        ways.open(print, exact_tiles=False)
        opened.set()

    with ways.passing(2, tiles=False):
        thread = threading.Thread(target=come)
        thread.start()
        assert not opened.wait(0.1)
    thread.join(10)
    assert opened.is_set()


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="the table is touched on Linux and x86-64 only"
)
def test_scores_are_the_same_to_the_last_bit(tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python, the extra `llamacpp`, is not installed")
    path = tiny_models.write_llama_bpe(tmp_path / "model.gguf", quantization=gguf.GGMLQuantizationType.Q8_0)
    done = subprocess.run([sys.executable, "-c", COMPARE, str(path)], capture_output=True, text=True, check=True)
    untouched, same, num_different, taken = json.loads(done.stdout.splitlines()[-1])
    assert untouched and same and num_different > 5
    assert taken == {"ggml_is_numa": True, "llamafile_sgemm": True, "pthread_setaffinity_np": True}
