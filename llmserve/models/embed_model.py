"""From a model file to an engine that makes vectors, on either library."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from llmserve.config import ModelSpec
from llmserve.engine.backend import Embedder
from llmserve.engine.chat_template import Text
from llmserve.engine.compute import ComputeBudget
from llmserve.engine.embedding_engine import EmbeddingEngine
from llmserve.engine.engine import Engine, EngineInfo, EngineSettings
from llmserve.engine.gguf import GGUFFile
from llmserve.engine.statistics import StatisticsCounter
from llmserve.engine.tokenizer import Tokenizer
from llmserve.errors import ModelFileError
from llmserve.models import probe
from llmserve.models.files import fingerprint, identity
from llmserve.models.probe import Trial

log = logging.getLogger(__name__)

_POOLINGS = {0: "", 1: "mean", 2: "cls", 3: "last"}
"""By the values of a file's pooling_type, enum llama_pooling_type of llama.h."""

_ENCODERS = frozenset(
    "bert nomic-bert nomic-bert-moe jina-bert-v2 jina-bert-v3 neo-bert modern-bert eurobert gemma-embedding".split()
)
"""Architectures that make vectors and nothing else."""

_BYTES_PER_KV_VALUE = 2


def is_wanted(spec: ModelSpec, header: GGUFFile) -> bool:
    """Whether the model is to make vectors: by its configuration, else because it is made for that."""
    architecture = header.get("general.architecture", str) or ""
    made_for_it = architecture in _ENCODERS or header.metadata.get(f"{architecture}.pooling_type", 0) != 0
    return spec.task == "embed" or (spec.task == "auto" and made_for_it)


def choose_pooling(spec: ModelSpec, header: GGUFFile) -> str:
    """How a text's vector is made of its tokens': as configured, else as the file says, else by the last of them.

    Raises ModelFileError for files that do something else, as rerankers do.
    """
    if spec.pooling != "auto":
        return spec.pooling
    architecture = header.get("general.architecture", str) or ""
    value = header.get(f"{architecture}.pooling_type", int) or 0
    if value not in _POOLINGS:
        raise ModelFileError(f"The model's pooling type {value} makes no vector of a text.")
    return _POOLINGS[value] or ("mean" if architecture in _ENCODERS else "last")


Opened = tuple[Embedder, Tokenizer, Callable[[str], list[int]]]


@dataclass(frozen=True, slots=True)
class EmbeddingModel:
    """A model whose file is here, `path` as its library opens it. `open_library` gives its embedder, its tokenizer, and how texts
    are encoded.
    """

    spec: ModelSpec
    source: Path
    path: Path
    header: GGUFFile
    pooling: str
    library: str
    reason: str
    trial: Trial
    open_library: Callable[[Trial], Opened]

    def fallback(self, cache_dir: Path) -> tuple[EmbeddingModel, Path] | None:
        """There are machines on which llama.cpp dies of repacked weights."""
        other = replace(self, trial=self.trial._replace(repack=False))
        return (other, probe.no_repack_note(cache_dir)) if self.trial.repack else None

    def tokenizer(self) -> None:
        """It has none without its library."""

    def open(self, budget: ComputeBudget, statistics: StatisticsCounter, *, reads_text: bool = True) -> Engine:
        """Load the model. Raises ModelFileError."""
        try:
            embedder, tokenizer, encode = self.open_library(self.trial)
        except RuntimeError as error:
            raise ModelFileError(f"{self.source.name} cannot be loaded: {error}.") from error
        return EmbeddingEngine(self.info, embedder, tokenizer, encode, budget, self.settings, statistics)

    @property
    def settings(self) -> EngineSettings:
        return EngineSettings(self.spec.max_waiting)

    @property
    def info(self) -> EngineInfo:
        shape = (identity(self.source), self.trial, self.pooling, self.library)
        return EngineInfo(
            identity=fingerprint(*shape),
            name=self.library.partition(" ")[0],
            reason=probe.explain(self.reason, self.trial),
            context_length=self.trial.context_length,
            num_slots=1,
            weights_bytes=self.header.size,
            kv_cache_bytes=self._kv_cache_bytes,
        )

    @property
    def _kv_cache_bytes(self) -> int:
        """None for encoders, whose tokens are all evaluated at once."""
        architecture = self.header.get("general.architecture", str)
        if architecture in _ENCODERS:
            return 0
        num_layers = self.header.get(f"{architecture}.block_count", int) or 0
        width = self.header.get(f"{architecture}.embedding_length", int) or 0
        return 2 * num_layers * width * self.trial.context_length * _BYTES_PER_KV_VALUE


def on_llamacpp(
    spec: ModelSpec, source: Path, header: GGUFFile, context_length: int, repack: bool, reason: str
) -> EmbeddingModel:
    """Raises ModelFileError."""
    from llmserve.engine.llamacpp_backend import LlamaCppSettings
    from llmserve.engine.llamacpp_embedder import LlamaCppEmbedder
    from llmserve.models.batch_model import make_tokenizer

    _check_isolation(spec)
    pooling = choose_pooling(spec, header)

    def open_library(trial: Trial) -> Opened:
        settings = LlamaCppSettings(spec.kv_type, spec.flash_attention, spec.gpu_layers, trial.repack)
        embedder = LlamaCppEmbedder(source, context_length, pooling, settings)
        try:
            return embedder, make_tokenizer(header, embedder), embedder.encode
        except BaseException:
            embedder.close()
            raise

    library = f"llamacpp {version('llama_cpp_python')}"
    trial = Trial("llamacpp-embeddings", context_length, pooling, repack)
    return EmbeddingModel(spec, source, source, header, pooling, library, reason, trial, open_library)


def on_ctransformers(
    spec: ModelSpec, source: Path, path: Path, header: GGUFFile, context_length: int, reason: str
) -> EmbeddingModel:
    """`path` is the file that the library opens in the place of `source`. Raises ModelFileError."""
    from llmserve.engine.ctransformers_backend import CTransformersBackend
    from llmserve.engine.ctransformers_embedder import CTransformersEmbedder
    from llmserve.models.slot_model import make_tokenizer

    _check_isolation(spec)
    if header.get("general.architecture", str) != "llama":
        raise ModelFileError("ctransformers gives vectors of llama models only; llama.cpp gives those of all.")
    pooling = choose_pooling(spec, header)

    def open_library(trial: Trial) -> Opened:
        backend = CTransformersBackend(path, context_length)
        try:
            tokenizer = make_tokenizer(header, backend)
        except BaseException:
            backend.close()
            raise
        return CTransformersEmbedder(backend, pooling), tokenizer, lambda text: tokenizer.encode([Text(text)] if text else [])

    library = f"ctransformers {version('ctransformers')}"
    trial = Trial("ctransformers", context_length)
    return EmbeddingModel(spec, source, path, header, pooling, library, reason, trial, open_library)


def _check_isolation(spec: ModelSpec) -> None:
    if spec.isolation == "process":
        raise ModelFileError('isolation = "process" is for models that make text; this one makes vectors.')
