"""From a model file to an engine on ctransformers: adapt it, open a slot after the other."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from llmserve.config import ModelSpec
from llmserve.engine import gguf
from llmserve.engine.chat_template import ChatTemplate
from llmserve.engine.compute import ComputeBudget
from llmserve.engine.ctransformers_backend import CTransformersBackend
from llmserve.engine.engine import Engine, EngineInfo, EngineSettings
from llmserve.engine.gguf import GGUFFile
from llmserve.engine.slot_engine import SlotEngine
from llmserve.engine.statistics import StatisticsCounter
from llmserve.engine.tokenizer import BPETokenizer, LibraryTokenizer, Tokenizer
from llmserve.errors import ModelFileError
from llmserve.models import adapt, embed_model, ggml
from llmserve.models.common import choose_context_length, make_chat_template
from llmserve.models.embed_model import EmbeddingModel
from llmserve.models.files import fingerprint, identity
from llmserve.models.probe import Trial

_BYTES_PER_KV_VALUE = 2  # float16
_LONGEST_CHUNK = 512  # tokens; ctransformers has buffers for so many (llama.cpp's n_batch) and aborts beyond


def prepare(spec: ModelSpec, source: Path, reason: str, cache_dir: Path) -> SlotModel | EmbeddingModel:
    """Check and adapt a file. Slow on the first time. Raises ModelFileError."""
    path, facts = (source, _ggml_facts(spec, source)) if spec.model_type else _adapted(spec, source, cache_dir)
    if spec.task == "embed":
        if facts.header is None:
            raise ModelFileError("ctransformers gives vectors of llama models in GGUF files only.")
        return embed_model.on_ctransformers(spec, source, path, facts.header, facts.context_length, reason)
    return SlotModel(spec, path, facts, identity(source), reason)


def _adapted(spec: ModelSpec, source: Path, cache_dir: Path) -> tuple[Path, _Facts]:
    """The file to load in the place of a GGUF file, and what that says."""
    header = gguf.read(source)
    context_length = choose_context_length(spec, source, _hyperparameter(header, "context_length"))
    adaptation = adapt.plan(header, context_length)
    return adapt.adapt(source, header, adaptation, cache_dir), _gguf_facts(header, context_length, spec.slots)


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the file's header says. Bytes are of all slots together."""

    header: GGUFFile | None  # None: a GGML file, from before GGUF
    library_type: str  # of a GGML file; the library knows GGUF files by themselves
    context_length: int
    weights_bytes: int
    kv_cache_bytes: int


@dataclass(frozen=True, slots=True)
class SlotModel:
    """A model whose file is here."""

    spec: ModelSpec
    path: Path
    facts: _Facts
    file_identity: str
    reason: str

    @property
    def header(self) -> GGUFFile | None:
        return self.facts.header

    @property
    def trial(self) -> Trial:
        return Trial("ctransformers", self.facts.context_length, self.facts.library_type)

    def fallback(self, cache_dir: Path) -> None:
        """There is no other way to open it."""

    def tokenizer(self, *, reads: bool = True) -> Tokenizer | None:
        """The one that needs no library: byte-level BPE. Raises ModelFileError."""
        return bpe_tokenizer(self.header, reads=reads)

    def vectors(self, tokenizer: Tokenizer, dimensions: int | None) -> None:
        """It makes text."""

    def open(self, budget: ComputeBudget, statistics: StatisticsCounter, *, reads_text: bool = True) -> Engine:
        """Load the model once per slot; without what reads text, if the engine is to be given token ids only. Raises ModelFileError."""
        with ExitStack() as opened:
            bpe = self.tokenizer(reads=reads_text)  # first, for what it leaves in memory is room for the slots' tables
            backends = [opened.enter_context(closing(self._open_backend())) for _ in range(self.spec.slots)]
            tokenizer = bpe or _library_tokenizer(self.header, backends[0])
            engine = SlotEngine(
                info=self.info,
                backends=backends,
                tokenizer=tokenizer,
                chat_template=make_chat_template(self.spec, self.header, tokenizer) if reads_text else ChatTemplate(None),
                budget=budget,
                settings=self.settings,
                statistics=statistics,
            )
            opened.pop_all()  # the engine closes them from now on
        return engine

    def _open_backend(self) -> CTransformersBackend:
        try:
            return CTransformersBackend(self.path, self.facts.context_length, self.facts.library_type)
        except RuntimeError as error:
            raise ModelFileError(f"{self.path.name} cannot be loaded: {error}.") from error

    @property
    def settings(self) -> EngineSettings:
        spec = self.spec
        return EngineSettings(spec.max_waiting, min(spec.prefill_chunk, _LONGEST_CHUNK), spec.prefix_cache)

    @property
    def info(self) -> EngineInfo:
        library = f"ctransformers {version('ctransformers')}"
        shape = (self.file_identity, self.facts.context_length, self.spec.chat_template, self.spec.model_type, library)
        return EngineInfo(
            identity=fingerprint(*shape),
            name="ctransformers",
            reason=self.reason,
            context_length=self.facts.context_length,
            num_slots=self.spec.slots,
            weights_bytes=self.facts.weights_bytes,
            kv_cache_bytes=self.facts.kv_cache_bytes,
        )


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
    context_length = choose_context_length(spec, path, file.context_length)
    kv_cache_bytes = file.kv_cache_bytes(context_length)
    return _Facts(None, file.library_type, context_length, spec.slots * file.size, spec.slots * kv_cache_bytes)


def make_tokenizer(header: GGUFFile, backend: CTransformersBackend, *, reads: bool) -> Tokenizer:
    return bpe_tokenizer(header, reads=reads) or _library_tokenizer(header, backend)


def bpe_tokenizer(header: GGUFFile | None, *, reads: bool = True) -> Tokenizer | None:
    """The one that needs no library: byte-level BPE. Raises ModelFileError."""
    if header is None or header.metadata.get("tokenizer.ggml.model") != "gpt2":
        return None
    return BPETokenizer.from_gguf(header.metadata, reads=reads)


def _library_tokenizer(header: GGUFFile | None, backend: CTransformersBackend) -> Tokenizer:
    if header is None:
        pieces = [backend.piece(token_id) for token_id in range(backend.vocab_size)]
        return LibraryTokenizer.from_pieces(pieces, backend.tokenize)
    return LibraryTokenizer.from_gguf(header.metadata, backend.tokenize)
