"""From a model file to an engine that makes vectors, on either library."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from llmserve.config import ModelSpec
from llmserve.engine.backend import Embedder
from llmserve.engine.chat_template import Text
from llmserve.engine.compute import ComputeBudget
from llmserve.engine.embedding_engine import EmbeddingEngine
from llmserve.engine.engine import Engine, EngineInfo, EngineSettings, Vectors
from llmserve.engine.gguf import GGUFFile
from llmserve.engine.statistics import StatisticsCounter
from llmserve.engine.tokenizer import LibraryTokenizer, Place, Tokenizer
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


class _Library(Protocol):
    """How one of the libraries makes vectors. Picklable."""

    name: str
    distribution: str

    def open(self, model: EmbeddingModel, *, reads_text: bool) -> tuple[Embedder, Tokenizer]:
        """Raises RuntimeError, and ModelFileError."""
        ...

    def tokenizer(self, header: GGUFFile) -> Tokenizer | None:
        """The one that needs no library, if it has one. Raises ModelFileError."""
        ...

    def encode(self, tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        """The token ids whose vectors texts get, none of them empty."""
        ...


@dataclass(frozen=True, slots=True)
class EmbeddingModel:
    """A model whose file is here, `path` as its library opens it."""

    spec: ModelSpec
    source: Path
    path: Path
    header: GGUFFile
    pooling: str
    library: _Library
    reason: str
    trial: Trial

    def fallback(self, cache_dir: Path) -> tuple[EmbeddingModel, Path] | None:
        """There are machines on which llama.cpp dies of repacked weights."""
        other = replace(self, trial=self.trial._replace(repack=False))
        return (other, probe.no_repack_note(cache_dir)) if self.trial.repack else None

    def tokenizer(self) -> Tokenizer | None:
        """The one that needs no library, if it has one. Raises ModelFileError."""
        return self.library.tokenizer(self.header)

    def vectors(self, tokenizer: Tokenizer, dimensions: int | None) -> Vectors:
        """What it makes instead of text."""
        assert dimensions is not None
        return Vectors(dimensions, partial(self.library.encode, tokenizer))

    def open(self, budget: ComputeBudget, statistics: StatisticsCounter, *, reads_text: bool = True) -> Engine:
        """Load the model; without what reads text, if the engine is to be given token ids only. Raises ModelFileError."""
        try:
            embedder, tokenizer = self.library.open(self, reads_text=reads_text)
        except RuntimeError as error:
            raise ModelFileError(f"{self.source.name} cannot be loaded: {error}.") from error
        vectors = self.vectors(tokenizer, embedder.dimensions)
        return EmbeddingEngine(self.info, embedder, tokenizer, vectors, budget, self.settings, statistics)

    @property
    def settings(self) -> EngineSettings:
        return EngineSettings(self.spec.max_waiting)

    @property
    def info(self) -> EngineInfo:
        library = f"{self.library.name} {version(self.library.distribution)}"
        shape = (identity(self.source), self.trial, self.pooling, library)
        return EngineInfo(
            identity=fingerprint(*shape),
            name=self.library.name,
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
    pooling = choose_pooling(spec, header)
    trial = Trial("llamacpp-embeddings", context_length, pooling, repack)
    return EmbeddingModel(spec, source, source, header, pooling, _LlamaCpp(), reason, trial)


def on_ctransformers(
    spec: ModelSpec, source: Path, path: Path, header: GGUFFile, context_length: int, reason: str
) -> EmbeddingModel:
    """`path` is the file that the library opens in the place of `source`. Raises ModelFileError."""
    if header.get("general.architecture", str) != "llama":
        raise ModelFileError("ctransformers gives vectors of llama models only; llama.cpp gives those of all.")
    trial = Trial("ctransformers", context_length)
    return EmbeddingModel(spec, source, path, header, choose_pooling(spec, header), _CTransformers(), reason, trial)


# Each of them imports its library, so they are imported when needed.


class _LlamaCpp:
    name = "llamacpp"
    distribution = "llama_cpp_python"

    def open(self, model: EmbeddingModel, *, reads_text: bool) -> tuple[Embedder, Tokenizer]:
        from llmserve.engine.llamacpp_backend import LlamaCppSettings
        from llmserve.engine.llamacpp_embedder import LlamaCppEmbedder
        from llmserve.models.batch_model import make_tokenizer

        spec, trial = model.spec, model.trial
        settings = LlamaCppSettings(spec.kv_type, spec.flash_attention, spec.gpu_layers, trial.repack)
        embedder = LlamaCppEmbedder(model.path, trial.context_length, model.pooling, settings)
        try:
            return embedder, make_tokenizer(model.header, embedder, embedder.tokenize_whole)
        except BaseException:
            embedder.close()
            raise

    def tokenizer(self, header: GGUFFile) -> None:
        """It has none that needs no library."""

    def encode(self, tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        """As the library does it, for it knows what else is around a text."""
        assert isinstance(tokenizer, LibraryTokenizer)
        return tokenizer.tokenize([text.encode("utf-8", "replace") for text in texts], Place.WHOLE)


class _CTransformers:
    name = distribution = "ctransformers"

    def open(self, model: EmbeddingModel, *, reads_text: bool) -> tuple[Embedder, Tokenizer]:
        from llmserve.engine.ctransformers_backend import CTransformersBackend
        from llmserve.engine.ctransformers_embedder import CTransformersEmbedder
        from llmserve.models.slot_model import make_tokenizer

        backend = CTransformersBackend(model.path, model.trial.context_length)
        try:
            return CTransformersEmbedder(backend, model.pooling), make_tokenizer(model.header, backend, reads=reads_text)
        except BaseException:
            backend.close()
            raise

    def tokenizer(self, header: GGUFFile) -> Tokenizer | None:
        from llmserve.models.slot_model import bpe_tokenizer

        return bpe_tokenizer(header)

    def encode(self, tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        return [tokenizer.encode([Text(text)]) for text in texts]
