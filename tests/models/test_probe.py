import os

import numpy as np
import pytest

from llmserve.engine import ctransformers_backend
from llmserve.errors import ModelFileError
from llmserve.models import probe
from llmserve.models.loading import has_llamacpp
from llmserve.models.probe import Trial
from tests import tiny_models
from tests.tiny_models import CONTEXT_LENGTH, write_ggml, write_llama_spm

needs_llamacpp = pytest.mark.skipif(not has_llamacpp(), reason="llama-cpp-python, the extra `llamacpp`, is not installed")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


def replace_content(path, content, *, hidden):
    """Write other content of the same size; `hidden` leaves the time of change as it was."""
    before = path.stat()
    path.write_bytes(content.ljust(before.st_size, b"\0"))
    moment = before.st_mtime_ns if hidden else before.st_mtime_ns + 1
    os.utime(path, ns=(moment, moment))


def refusal(path, cache_dir, *, model_type="", context_length=CONTEXT_LENGTH):
    with pytest.raises(ModelFileError) as caught:
        probe.probe(path, Trial("ctransformers", context_length, model_type), cache_dir)
    assert str(path.parent) not in str(caught.value)
    return str(caught.value)


def test_a_good_file_passes_and_is_not_opened_again_until_it_changes(path, cache_dir):
    probe.probe(write_llama_spm(path), Trial("ctransformers", CONTEXT_LENGTH), cache_dir)
    replace_content(path, b"GGUF", hidden=True)
    probe.probe(path, Trial("ctransformers", CONTEXT_LENGTH), cache_dir)
    replace_content(path, b"GGUF", hidden=False)
    refusal(path, cache_dir)


def test_a_check_in_this_process_leaves_nothing_open(path, cache_dir):
    room = ctransformers_backend._objects._value
    probe.check(write_llama_spm(path), Trial("ctransformers", CONTEXT_LENGTH), cache_dir)
    assert ctransformers_backend._objects._value == room


def test_another_build_of_the_library_is_tried_again(tmp_path):
    (tmp_path / "lib").mkdir()
    library = tmp_path / "lib" / "libggml.so.0"
    library.write_bytes(b"one")
    (tmp_path / "model.py").write_text("")
    before = probe.shared_libraries(tmp_path)
    assert [name for name, _, _ in before] == ["libggml.so.0"]
    replace_content(library, b"two", hidden=False)
    assert probe.shared_libraries(tmp_path) != before


@pytest.mark.parametrize("engine", ["ctransformers", pytest.param("llamacpp", marks=needs_llamacpp)])
def test_a_verdict_knows_the_libraries_that_gave_it(engine, monkeypatch, path, cache_dir):
    write_llama_spm(path)
    before = probe._verdict(path, Trial(engine, CONTEXT_LENGTH), cache_dir)
    seen = []
    monkeypatch.setattr(probe, "shared_libraries", lambda folder: seen.append(folder.name))
    assert probe._verdict(path, Trial(engine, CONTEXT_LENGTH), cache_dir) != before
    assert seen == {"ctransformers": ["ctransformers"], "llamacpp": ["llama_cpp", "engine"]}[engine]


def test_a_bad_verdict_is_not_remembered(path, cache_dir):
    good = write_llama_spm(path).read_bytes()
    replace_content(path, b"GGUF", hidden=True)
    refusal(path, cache_dir)
    replace_content(path, good, hidden=True)
    probe.probe(path, Trial("ctransformers", CONTEXT_LENGTH), cache_dir)


def test_a_verdict_that_cannot_be_remembered_is_good_all_the_same(path, cache_dir):
    cache_dir.mkdir()
    (cache_dir / "probed").write_text("a file in the way")
    probe.probe(write_llama_spm(path), Trial("ctransformers", CONTEXT_LENGTH), cache_dir)


def test_a_crash_is_told_by_the_name_of_its_signal(path, cache_dir):
    write_ggml(path, "gpt2", heads=0)
    assert refusal(path, cache_dir, model_type="gpt2") == "model.gguf cannot be loaded: the library crashed with SIGFPE."


def test_the_reason_is_the_librarys_own_without_the_servers_folders(path, cache_dir):
    expected = "model.gguf cannot be loaded: gptj_model_load: invalid model file 'model.gguf' (bad vocab size 0 != 318)."
    assert refusal(write_ggml(path, "gpt_neox"), cache_dir, model_type="gptj") == expected


def test_scores_that_are_no_numbers_are_refused(path, cache_dir):
    broken = write_llama_spm(path, tensors={"output_norm.weight": np.full(64, np.nan, np.float32)})
    assert refusal(broken, cache_dir) == "model.gguf cannot be loaded: its scores are not finite numbers."


def test_a_model_that_outgrows_the_librarys_buffers_late_in_its_context_is_refused(path, cache_dir):
    write_ggml(path, "gpt2", context=8192, heads=64, layers=24)
    reason = refusal(path, cache_dir, model_type="gpt2", context_length=8192)
    assert "crashed with SIGSEGV (ggml_new_object: not enough space" in reason


def test_every_broken_file_is_refused_with_a_reason(tmp_path, cache_dir):
    files = tiny_models.broken_files(tmp_path, write_llama_spm(tmp_path / "good.gguf"))
    del files["missing"], files["half"]  # the library takes what lies in memory behind half a file for weights
    reasons = {name: refusal(path, cache_dir) for name, path in files.items()}
    assert all(reason.startswith(f"{name}.gguf cannot be loaded: ") for name, reason in reasons.items())
    # Which of them crash the library, and which it refuses, is up to what lies in memory behind them.
    assert any("the library crashed with SIG" in reason for reason in reasons.values())
