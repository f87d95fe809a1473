"""From a model spec to an engine: fetch the file, decide what can run it, adapt and probe it, open its slots."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
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
from llmserve.models import adapt, ggml, probe, sources
from llmserve.models.files import fingerprint, identity

DEFAULT_CONTEXT_LENGTH = 2048
_BYTES_PER_KV_VALUE = 2  # float16
_LONGEST_CHUNK = 512  # tokens; ctransformers has buffers for so many (llama.cpp's n_batch) and aborts beyond


class Loader:
    """Opens the models of one server; they share its compute budget. Thread-safe."""

    def __init__(self, server: ServerConfig) -> None:
        self._cache_dir = Path(server.cache_dir)
        self._budget = ComputeBudget(server.cores or _num_cores())

    def prepare(self, spec: ModelSpec) -> Prepared:
        """Fetch, check, adapt and probe the model's file. Slow on the first time. Raises ModelFileError."""
        source = sources.fetch(spec, self._cache_dir)
        if spec.model_type:
            path, facts = source, _ggml_facts(spec, source)
        else:
            path, facts = self._adapt(spec, source)
        probe.probe(path, facts.context_length, facts.library_type, self._cache_dir)
        return Prepared(spec, path, facts, identity(source), self._budget)

    def _adapt(self, spec: ModelSpec, source: Path) -> tuple[Path, _Facts]:
        """The file to load in the place of a GGUF file, and what that says."""
        header = gguf.read(source)
        context_length = _context_length(spec, source, _hyperparameter(header, "context_length") or DEFAULT_CONTEXT_LENGTH)
        adaptation = adapt.plan(header, context_length)
        return adapt.adapt(source, header, adaptation, self._cache_dir), _gguf_facts(header, context_length, spec.slots)


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the file's header says. Bytes are of all slots together."""

    header: GGUFFile | None  # None: a GGML file, from before GGUF
    library_type: str  # of a GGML file; the library knows GGUF files by themselves
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
        with ExitStack() as opened:
            bpe = _bpe_tokenizer(self.facts.header)  # first, for what it leaves in memory is room for the slots' tables
            backends = [opened.enter_context(closing(self._open_backend())) for _ in range(spec.slots)]
            tokenizer = bpe or _library_tokenizer(self.facts.header, backends[0])
            engine = Engine(
                info=self._info(),
                backends=backends,
                tokenizer=tokenizer,
                chat_template=_chat_template(spec, self.facts.header, tokenizer),
                budget=self.budget,
                settings=EngineSettings(spec.max_waiting, min(spec.prefill_chunk, _LONGEST_CHUNK), spec.prefix_cache),
                statistics=statistics,
            )
            opened.pop_all()  # the engine closes them from now on
        return engine

    def _open_backend(self) -> CTransformersBackend:
        try:
            return CTransformersBackend(self.path, self.facts.context_length, self.facts.library_type)
        except RuntimeError as error:
            raise ModelFileError(f"{self.path.name} cannot be loaded: {error}.") from error

    def _info(self) -> EngineInfo:
        library = f"ctransformers {version('ctransformers')}"
        shape = (self.file_identity, self.facts.context_length, self.spec.chat_template, self.spec.model_type, library)
        asked_for = self.spec.engine == "ctransformers"
        return EngineInfo(
            identity=fingerprint(*shape),
            name="ctransformers",
            reason="it was asked for" if asked_for else f"{library} is installed and can run this file",
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


def _gguf_facts(header: GGUFFile, context_length: int, num_slots: int) -> _Facts:
    """Of a header that `adapt.plan` has found in order."""
    num_heads = _hyperparameter(header, "attention.head_count")
    num_kv_heads = _hyperparameter(header, "attention.head_count_kv") or num_heads
    kv_width = _hyperparameter(header, "embedding_length") // num_heads * num_kv_heads
    kv_cache_bytes = 2 * _hyperparameter(header, "block_count") * context_length * kv_width * _BYTES_PER_KV_VALUE
    return _Facts(header, "", context_length, header.size, num_slots * kv_cache_bytes)


def _hyperparameter(header: GGUFFile, name: str) -> int:
    """0 if it is missing. Raises ModelFileError."""
    return header.get(f"{header.get('general.architecture', str)}.{name}", int) or 0


def _ggml_facts(spec: ModelSpec, path: Path) -> _Facts:
    """GGML files are not mapped: each slot has a copy of the weights."""
    file = ggml.read(path, spec.model_type)
    context_length = _context_length(spec, path, file.context_length)
    kv_cache_bytes = file.kv_cache_bytes(context_length)
    return _Facts(None, file.library_type, context_length, spec.slots * file.size, spec.slots * kv_cache_bytes)


def _context_length(spec: ModelSpec, path: Path, trained: int) -> int:
    if spec.context_length > trained:
        raise ModelFileError(
            f"{path.name} was trained for a context of {trained} tokens; context_length = {spec.context_length} is beyond it."
        )
    return spec.context_length or min(DEFAULT_CONTEXT_LENGTH, trained)


def _bpe_tokenizer(header: GGUFFile | None) -> Tokenizer | None:
    if header is None or header.metadata.get("tokenizer.ggml.model") != "gpt2":
        return None
    return BPETokenizer.from_gguf(header.metadata)


def _library_tokenizer(header: GGUFFile | None, backend: CTransformersBackend) -> Tokenizer:
    if header is None:
        pieces = [backend.piece(token_id) for token_id in range(backend.vocab_size)]
        return LibraryTokenizer.from_pieces(pieces, backend.tokenize)
    return LibraryTokenizer.from_gguf(header.metadata, backend.tokenize)


def _chat_template(spec: ModelSpec, header: GGUFFile | None, tokenizer: Tokenizer) -> ChatTemplate:
    source = spec.chat_template or (header.get("tokenizer.chat_template", str) if header is not None else None)
    return ChatTemplate(source, tokenizer.control_texts, special_texts(header.metadata) if header is not None else {})
