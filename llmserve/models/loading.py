"""From a model's configuration to its engine: fetch the file, decide which library runs it, and have that one prepare it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from llmserve.config import ModelSpec, ServerConfig
from llmserve.engine.compute import ComputeBudget
from llmserve.errors import ModelFileError
from llmserve.models import sources

if TYPE_CHECKING:
    from llmserve.models.isolation import Model, ProcessModel, ThreadModel


class Loader:
    """Opens the models of one server; they share its compute budget. Thread-safe."""

    def __init__(self, server: ServerConfig) -> None:
        self._cache_dir = server.cache_folder
        self._budget = ComputeBudget(server.cores or _num_cores())

    def prepare(self, spec: ModelSpec) -> ProcessModel | ThreadModel:
        """Fetch, check, adapt and perhaps probe the model's file. Slow on the first time. Raises ModelFileError."""
        from llmserve.models import isolation

        return isolation.prepare(self._find(spec), self._budget, self._cache_dir)

    def _find(self, spec: ModelSpec) -> Model:
        engine, reason = choose_engine(spec, has_llamacpp())
        source = sources.fetch(spec, self._cache_dir)
        # Imported when needed: each of them imports its library.
        if engine == "llamacpp":
            from llmserve.models import batch_model

            return batch_model.prepare(spec, source, reason, self._cache_dir)
        from llmserve.models import slot_model

        return slot_model.prepare(spec, source, reason, self._cache_dir)


def has_llamacpp() -> bool:
    """Whether llama-cpp-python, the extra, is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def choose_engine(spec: ModelSpec, llamacpp: bool) -> tuple[str, str]:
    """Which library runs a model, and why. Raises ModelFileError when it cannot be the one that was asked for."""
    if spec.engine == "ctransformers":
        return "ctransformers", "it was asked for"
    if spec.engine == "llamacpp":
        if spec.model_type:
            raise ModelFileError(f"llama.cpp reads GGUF files only, and {spec.id} has a model_type, as GGML files need it.")
        if not llamacpp:
            raise ModelFileError('engine = "llamacpp" needs llama-cpp-python: pip install "llmserve[llamacpp]".')
        return "llamacpp", "it was asked for"
    if spec.model_type:
        return "ctransformers", "GGML files, from before GGUF, are run by ctransformers alone"
    if llamacpp:
        return "llamacpp", "llama-cpp-python is installed, which runs every current model and many requests in one pass"
    return "ctransformers", "llama-cpp-python is not installed"


def _num_cores() -> int:
    """Cores this process may use: less than the machine's where its affinity or its control group says so (cgroups(7), cpu.max)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores
