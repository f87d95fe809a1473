"""From a model spec to an engine: fetch the file, decide what can run it, adapt and probe it, open its slots."""

from __future__ import annotations

import logging
import os
import struct
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from llmserve.config import ModelSpec, ServerConfig
from llmserve.engine import gguf
from llmserve.engine.chat_template import ChatTemplate
from llmserve.engine.compute import ComputeBudget
from llmserve.engine.ctransformers_backend import CTransformersBackend
from llmserve.engine.engine import Engine, EngineInfo, EngineSettings
from llmserve.engine.gguf import GGUFFile
from llmserve.engine.statistics import StatisticsCounter
from llmserve.engine.tokenizer import BPETokenizer, LibraryTokenizer, Tokenizer
from llmserve.engine.vocabulary import special_texts
from llmserve.errors import ModelFileError
from llmserve.models import adapt, probe, sources
from llmserve.models.files import fingerprint, identity

log = logging.getLogger(__name__)

DEFAULT_CONTEXT_LENGTH = 2048
_BYTES_PER_KV_VALUE = 2  # float16
_GGML_MAGICS = (b"lmgg", b"fmgg", b"tjgg")  # "ggml", "ggmf", "ggjt" as little-endian integers


class Loader:
    """Opens the models of one server; they share its compute budget. Thread-safe."""

    def __init__(self, server: ServerConfig) -> None:
        self._cache_dir = Path(server.cache_dir)
        self._budget = ComputeBudget(server.cores or _num_cores())

    def prepare(self, spec: ModelSpec) -> Prepared:
        """Fetch, check, adapt and probe the model's file. Slow on the first time. Raises ModelFileError."""
        source = sources.fetch(spec, self._cache_dir)
        facts = _ggml_facts(spec, source) if spec.model_type else _gguf_facts(spec, source)
        path = source
        if facts.header is not None:
            adaptation = adapt.plan(facts.header, facts.context_length)
            path = adapt.adapt(source, facts.header, adaptation, self._cache_dir)
        probe.probe(path, facts.context_length, spec.model_type, self._cache_dir)
        return Prepared(spec, path, facts, identity(source), self._budget)


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the file's header says. Bytes are of all slots together."""

    header: GGUFFile | None  # None: a GGML file, from before GGUF
    context_length: int
    weights_bytes: int
    kv_cache_bytes: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model whose file is here and known to open."""

    spec: ModelSpec
    path: Path
    facts: _Facts
    file_identity: str
    budget: ComputeBudget

    @property
    def memory_bytes(self) -> int:
        return self.facts.weights_bytes + self.facts.kv_cache_bytes

    def open(self, statistics: StatisticsCounter) -> Engine:
        """Load the model once per slot and build its tokenizer and chat template. Raises ModelFileError."""
        spec = self.spec
        try:
            backends = [CTransformersBackend(self.path, self.facts.context_length, spec.model_type) for _ in range(spec.slots)]
        except RuntimeError as error:
            raise ModelFileError(f"{self.path.name} cannot be loaded: {error}.") from error
        tokenizer = _tokenizer(self.facts.header, backends[0])
        return Engine(
            info=self._info(),
            backends=backends,
            tokenizer=tokenizer,
            chat_template=_chat_template(spec, self.facts.header, tokenizer),
            budget=self.budget,
            settings=EngineSettings(spec.max_waiting, spec.prefill_chunk, spec.prefix_cache),
            statistics=statistics,
        )

    def _info(self) -> EngineInfo:
        library = f"ctransformers {version('ctransformers')}"
        shape = (self.file_identity, self.facts.context_length, self.spec.chat_template, self.spec.model_type, library)
        return EngineInfo(
            identity=fingerprint(*shape),
            name="ctransformers",
            reason="it was asked for" if self.spec.engine == "ctransformers" else f"{library} is installed and can run this file",
            context_length=self.facts.context_length,
            num_slots=self.spec.slots,
            weights_bytes=self.facts.weights_bytes,
            kv_cache_bytes=self.facts.kv_cache_bytes,
        )


def _num_cores() -> int:
    """Cores this process may use: less than the machine's where its affinity or its control group says so (cgroups(7), cpu.max)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def _gguf_facts(spec: ModelSpec, path: Path) -> _Facts:
    header = gguf.read(path)
    architecture = header.get("general.architecture", str) or ""
    trained = header.get(f"{architecture}.context_length", int) or DEFAULT_CONTEXT_LENGTH
    context_length = _context_length(spec, path, trained)
    num_layers = header.get(f"{architecture}.block_count", int) or 0
    num_heads = header.get(f"{architecture}.attention.head_count", int) or 1
    num_kv_heads = header.get(f"{architecture}.attention.head_count_kv", int) or num_heads
    kv_width = (header.get(f"{architecture}.embedding_length", int) or 0) // num_heads * num_kv_heads
    kv_cache_bytes = 2 * num_layers * context_length * kv_width * _BYTES_PER_KV_VALUE
    return _Facts(header, context_length, header.size, spec.slots * kv_cache_bytes)


def _ggml_facts(spec: ModelSpec, path: Path) -> _Facts:
    """GGML files begin with a magic and bare hyperparameters, in an order of each model type's own (ggml's examples, 2023).

    They are not mapped: each slot has a copy of the weights. The cache is counted at 4 bytes a value, which some types take.
    """
    with path.open("rb") as file:
        head = file.read(24)
    if head[:4] not in _GGML_MAGICS or len(head) < 24:
        raise ModelFileError(f"{path.name} is not a GGML file, which model_type = {spec.model_type!r} says it is.")
    first, num_positions, third, fourth, fifth = struct.unpack_from("<5i", head, 4)
    if spec.model_type in ("mpt", "replit"):
        width, num_layers = first, fourth
    else:
        width, num_layers = third, fifth
    context_length = _context_length(spec, path, num_positions)
    kv_cache_bytes = 2 * num_layers * num_positions * width * 4
    return _Facts(None, context_length, spec.slots * path.stat().st_size, spec.slots * max(0, kv_cache_bytes))


def _context_length(spec: ModelSpec, path: Path, trained: int) -> int:
    if spec.context_length > trained:
        raise ModelFileError(
            f"{path.name} was trained for a context of {trained} tokens; context_length = {spec.context_length} is beyond it."
        )
    return spec.context_length or min(DEFAULT_CONTEXT_LENGTH, trained)


def _tokenizer(header: GGUFFile | None, backend: CTransformersBackend) -> Tokenizer:
    if header is None:
        pieces = [backend.piece(token_id) for token_id in range(backend.vocab_size)]
        return LibraryTokenizer.from_pieces(pieces, backend.tokenize)
    if header.metadata.get("tokenizer.ggml.model") == "gpt2":
        return BPETokenizer.from_gguf(header.metadata)
    return LibraryTokenizer.from_gguf(header.metadata, backend.tokenize)


def _chat_template(spec: ModelSpec, header: GGUFFile | None, tokenizer: Tokenizer) -> ChatTemplate:
    source = spec.chat_template or (header.get("tokenizer.chat_template", str) if header is not None else None)
    return ChatTemplate(source, tokenizer.control_texts, special_texts(header.metadata) if header is not None else {})
