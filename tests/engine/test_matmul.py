"""The ways of ggml: when they may change, and that they change no score."""

import importlib.util
import json
import platform
import subprocess
import sys
import threading

import gguf
import pytest

from llmserve.engine import matmul
from llmserve.engine.matmul import MatMul
from tests import tiny_models

COMPARE = """
import json, sys
from pathlib import Path
from llmserve.engine import matmul
from llmserve.engine.backend import Piece
from llmserve.engine.llamacpp_backend import LlamaCppBackend, LlamaCppSettings

def scores(path):
    backend = LlamaCppBackend(Path(path), 256, 8, 128, LlamaCppSettings(flash_attention="on", tiles_from=12))
    passes = []
    for pieces in (
        [Piece(0, 0, [5 + number % 90 for number in range(128)], True)],
        [Piece(number, 0, [9 + number] * 3, True) for number in range(1, 8)],
        [Piece(number, 3, [9 + number], True) for number in range(1, 8)],
        [Piece(0, 128, [7], True)],
        [Piece(0, 129, [7, 8, 9, 10], True, wants_all=True)],
    ):
        for threads in (2, 3):
            for piece in pieces:
                backend.truncate(piece.sequence, piece.position)
            backend.forward(pieces, threads)
            passes += [backend.logits(index).copy() for index in range(len(pieces))]
    backend.close()
    return passes

def mapped_flags(path):
    blocks = Path("/proc/self/smaps").read_text().split("VmFlags:")
    return [after.splitlines()[0].split() for before, after in zip(blocks, blocks[1:]) if path in before.splitlines()[1:2][0]]

def flags(path):
    backend = LlamaCppBackend(Path(path), 256, 1, 64, LlamaCppSettings())
    found = mapped_flags(path)
    backend.close()
    return found

ways, path = matmul.process, sys.argv[1]
before, read = scores(path), flags(path)
untouched = ways._table is None
ways.claim()
after = scores(path)
taken = {name: entry._value.value != entry._own for name, entry in ways._table.items()}
read_again = flags(path)
error = max(abs(ours - other).max() / abs(other).max() for ours, other in zip(after, before))
num_different = len({each.tobytes() for each in before})
print(json.dumps([untouched, float(error), num_different, taken, read, read_again]))
"""


class Entry:
    """What stands in the table, without a library."""

    def __init__(self):
        self.history = []

    def set(self, other):
        self.history.append(other)


class Ways(MatMul):
    """With a table of nothing, and a clock that is set."""

    def __init__(self):
        self.now = 10.0
        super().__init__(clock=lambda: self.now)
        self.rows, self.tiles = Entry(), Entry()

    def passes(self, *tiles, threads=2):
        """What is chosen for one pass after the other: True where it is made without tiles."""
        for each in tiles:
            with self.passing(threads, tiles=each):
                pass
        return self.tiles.history


@pytest.fixture
def ways(monkeypatch):
    made = Ways()
    monkeypatch.setattr(
        "llmserve.engine.matmul._find_table", lambda function: {"ggml_is_numa": made.rows, "llamafile_sgemm": made.tiles}
    )
    return made


@pytest.fixture
def chosen(ways):
    ways.claim()
    ways.choose(print)
    return ways


def in_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_nothing_is_touched_in_a_process_that_others_share(ways):
    ways.choose(print)
    with ways.loading():
        assert ways.passes(False, True) == []


def test_nothing_is_chosen_before_somebody_wants_it(ways):
    ways.claim()
    assert ways.passes(False) == []


def test_a_pass_has_the_way_that_it_asks_for(chosen):
    assert chosen.passes(False, True) == [True, False]


def test_rows_are_divided_evenly_among_few_threads_only(chosen):
    for threads in (1, 4, 5):
        chosen.passes(True, threads=threads)
    assert chosen.rows.history == [True, True, False]


def test_rows_are_not_divided_evenly_while_a_model_is_read(chosen):
    with chosen.loading():
        chosen.passes(True)
    chosen.passes(True)
    assert chosen.rows.history == [False, False, True]


def test_nothing_changes_while_a_pass_is_under_way(chosen):
    with chosen.passing(2, tiles=True):
        assert chosen.passes(False) == [False]


def test_passes_that_overlap_have_tiles(chosen):
    with chosen.passing(2, tiles=True):
        chosen.passes(True)
    assert chosen.passes(False) == [False, False]
    chosen.now += 2
    assert chosen.passes(False) == [False, False, True]


def test_a_pass_waits_for_one_without_tiles_of_another_model(chosen):
    with chosen.passing(2, tiles=False):
        other = in_thread(lambda: chosen.passes(True))
        other.join(0.1)
        assert other.is_alive()
    other.join(10)
    assert chosen.tiles.history == [True, False]


def test_a_model_is_read_between_two_passes_however_many_come(chosen):
    def read():
        with chosen.loading():
            loaded.append(len(chosen.rows.history))

    loaded, ended = [], threading.Event()
    with chosen.passing(2, tiles=True):
        reader = in_thread(read)
        reader.join(0.1)
        assert reader.is_alive()
        streams = [in_thread(lambda: [chosen.passes(True) for _ in range(50)]) for _ in range(2)]
        ended.wait(0.1)
        assert chosen.rows.history == [True]  # they stand back
    for thread in (reader, *streams):
        thread.join(10)
    assert loaded == [2]


def test_a_pass_that_never_ends_keeps_no_other_model(chosen, monkeypatch):
    monkeypatch.setattr("llmserve.engine.matmul._PATIENCE", 0.05)
    with chosen.passing(2, tiles=False):
        with chosen.loading():
            chosen.passes(True)
        chosen.passes(True)
    assert chosen.rows.history == [True]  # nothing has changed under it


def test_models_that_come_at_once_look_for_the_table_once(monkeypatch):
    looks = []
    monkeypatch.setattr("llmserve.engine.matmul._find_table", lambda function: looks.append(function) or {})
    ways = MatMul()
    ways.claim()
    with ways.passing(2, tiles=True):
        threads = [in_thread(lambda: ways.choose(print)) for _ in range(3)]
        threads[0].join(0.1)
        assert looks == []
    for thread in threads:
        thread.join(10)
    assert looks == [print]


def test_what_cannot_be_found_is_left_alone(monkeypatch):
    def fail(function):
        raise LookupError("another library")

    monkeypatch.setattr("llmserve.engine.matmul._open_table", fail)
    ways = MatMul()
    ways.claim()
    ways.choose(print)
    with ways.loading(), ways.passing(2, tiles=False):
        pass


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="the table is touched on Linux and x86-64 only"
)
@pytest.mark.parametrize("quantization", ["Q8_0", "Q4_1", "Q4_0", "Q4_K"])
def test_scores_are_the_same_and_files_read_as_before(tmp_path, quantization):
    """To the last bit, but for types that kernels of ours multiply: those are rounded in another order (not where there is AMX)."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python, the extra `llamacpp`, is not installed")
    path = tiny_models.write_llama_bpe(tmp_path / "model.gguf", quantization=gguf.GGMLQuantizationType[quantization])
    done = subprocess.run([sys.executable, "-c", COMPARE, str(path)], capture_output=True, text=True, check=True)
    untouched, error, num_different, taken, read, read_again = json.loads(done.stdout.splitlines()[-1])
    assert untouched and num_different > 5
    ours = matmul.process.will_have_kernels() and quantization in ("Q8_0", "Q4_1")
    assert error < 0.02 if ours else error == 0
    assert taken == {"ggml_is_numa": True, "llamafile_sgemm": True}
    assert read == read_again and read
    assert done.stderr == ""


def test_a_process_that_others_share_will_have_no_kernels(monkeypatch):
    monkeypatch.setattr(matmul, "_is_supported", lambda: True)
    monkeypatch.setattr("llmserve.engine.kernels.library", object)
    shared, own = MatMul(), MatMul()
    own.claim()
    elftools = importlib.util.find_spec("elftools") is not None
    assert not shared.will_have_kernels()
    assert shared.will_have_kernels(claimed=True) == own.will_have_kernels() == elftools


def test_an_app_leaves_the_process_alone_unless_it_is_told_that_it_owns_it():
    script = (
        "import sys; from llmserve import create_app; from llmserve.config import Config; from llmserve.engine import matmul;"
        "from llmserve.app import _make_loader; _make_loader(Config(), sys.argv[1] == 'yes'); print(matmul.process._claimed)"
    )
    said = [
        subprocess.run([sys.executable, "-c", script, owns], capture_output=True, text=True, check=True).stdout.strip()
        for owns in ("no", "yes")
    ]
    assert said == ["False", "True"]
