"""Weights are made Q8_0 where that pays, once, and say the same."""

import pytest
from gguf.constants import GGMLQuantizationType as Quantization

from llmserve.config import ModelSpec
from llmserve.engine import gguf, matmul
from llmserve.models import requantize
from llmserve.models.loading import has_llamacpp
from tests import tiny_models

needs_llamacpp = pytest.mark.skipif(not has_llamacpp(), reason="llama-cpp-python, the extra `llamacpp`, is not installed")
QUANTIZATIONS = {kind.name: kind for kind in (Quantization.Q4_0, Quantization.Q4_1, Quantization.Q5_1, Quantization.Q8_0)}


@pytest.fixture
def machine(monkeypatch):
    """Decides what processor there seems to be, and whether kernels.c is of use on it."""

    def machine(name="x86_64", flags=("avx2",), kernels=None):
        monkeypatch.setattr("llmserve.engine.kernels.library", lambda: kernels)
        monkeypatch.setattr("platform.machine", lambda: name)
        monkeypatch.setattr("llmserve.models.probe.processor_flags", lambda: list(flags))

    machine()
    return machine


def is_wanted(path, repack=True, **options):
    return requantize.is_wanted(ModelSpec(id="m", source=str(path), **options), gguf.read(path), repack)


@pytest.mark.parametrize(("quantization", "wanted"), [("Q4_0", False), ("Q4_1", True), ("Q5_1", True), ("Q8_0", False)])
def test_weights_are_made_q8_0_if_there_are_no_kernels_of_several_tokens_for_them(tmp_path, machine, quantization, wanted):
    path = tiny_models.write_llama_bpe(tmp_path / "model.gguf", quantization=QUANTIZATIONS[quantization])
    assert is_wanted(path) is wanted
    assert is_wanted(path, weights="file") is False
    assert is_wanted(path, weights="q8_0") is (quantization != "Q8_0")


def test_weights_stay_where_the_processor_or_a_gpu_has_kernels_for_them(tmp_path, machine):
    path = tiny_models.write_llama_bpe(tmp_path / "model.gguf", quantization=Quantization.Q4_1)
    assert not is_wanted(path, gpu_layers=1)
    machine(flags=("avx2", "amx_int8"))
    assert not is_wanted(path)
    assert is_wanted(path, repack=False)  # its kernels are those of repacked weights
    machine(name="aarch64", flags=())
    assert not is_wanted(path)


def test_weights_stay_where_there_are_kernels_of_ours_for_them(tmp_path, machine, monkeypatch):
    machine(kernels=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    path = tiny_models.write_llama_bpe(tmp_path / "model.gguf", quantization=Quantization.Q4_1)
    assert not is_wanted(path)
    assert is_wanted(path, repack=False)  # the library is left alone
    assert is_wanted(path, weights="q8_0")
    assert is_wanted(tiny_models.write_llama_bpe(tmp_path / "other.gguf", quantization=Quantization.Q5_1))
    monkeypatch.setattr(matmul.process, "_claimed", False)
    assert is_wanted(path)
    assert not is_wanted(path, isolation="process")


def test_a_large_file_is_made_larger_only_if_that_is_asked_for(tmp_path, machine, monkeypatch):
    path = tiny_models.write_llama_bpe(tmp_path / "model.gguf", quantization=Quantization.Q4_1)
    monkeypatch.setattr(requantize, "_LARGEST", path.stat().st_size - 1)
    assert not is_wanted(path)
    assert is_wanted(path, weights="q8_0")


@needs_llamacpp
def test_all_matrices_are_made_q8_0_once_and_the_rest_stays(tmp_path):
    path = tiny_models.write_llama_bpe(tmp_path / "model.gguf", quantization=Quantization.Q4_1)
    made = requantize.requantize(path, tmp_path / "cache")
    before, after = gguf.read(path), gguf.read(made)
    assert {tensor.type.name for tensor in after.tensors if len(tensor.shape) > 1} == {"Q8_0"}
    assert {tensor.name: tensor.shape for tensor in after.tensors} == {tensor.name: tensor.shape for tensor in before.tensors}
    changed = {key for key, value in before.metadata.items() if after.metadata[key] != value}
    assert changed <= {"general.file_type", "general.quantization_version"}
    time = made.stat().st_mtime_ns
    assert requantize.requantize(path, tmp_path / "cache") == made
    assert made.stat().st_mtime_ns == time


@needs_llamacpp
def test_what_cannot_be_requantized_stays_as_it_is(tmp_path, caplog):
    path = tiny_models.write_llama_bpe(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:-100])
    assert requantize.requantize(path, tmp_path / "cache") == path
    assert "stay as they are" in caplog.text
    assert not list((tmp_path / "cache").rglob("*.gguf"))


@needs_llamacpp
def test_a_folder_that_cannot_be_written_to_costs_speed_and_no_more(tmp_path, caplog):
    path = tiny_models.write_llama_bpe(tmp_path / "model.gguf")
    (tmp_path / "cache").touch()
    assert requantize.requantize(path, tmp_path / "cache") == path
    assert "stay as they are" in caplog.text
