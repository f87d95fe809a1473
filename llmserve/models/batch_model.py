"""From a model file to an engine on llama.cpp: make weights of it that this processor is fast with, open it once for all slots."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from llmserve.config import ModelSpec
from llmserve.engine import gguf, matmul
from llmserve.engine.batch_engine import MOST_CHUNKS, BatchEngine
from llmserve.engine.chat_template import ChatTemplate
from llmserve.engine.compute import ComputeBudget
from llmserve.engine.engine import Engine, EngineInfo, EngineSettings
from llmserve.engine.gguf import GGUFFile
from llmserve.engine.llamacpp_backend import TILES_FROM, LlamaCppBackend, LlamaCppSettings
from llmserve.engine.slots import round_up_to_grid
from llmserve.engine.statistics import StatisticsCounter
from llmserve.engine.tokenizer import LibraryTokenizer, Tokenizer, TokenizeText, text_by_text
from llmserve.engine.vocabulary import Vocabulary
from llmserve.errors import ModelFileError
from llmserve.models import embed_model, probe, requantize
from llmserve.models.common import choose_context_length, make_chat_template
from llmserve.models.embed_model import EmbeddingModel
from llmserve.models.files import fingerprint, identity
from llmserve.models.probe import Trial

_EXACT = frozenset({"Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"})
"""Types of matrices that come to the same scores, to the last bit, with tiles and without, or are never multiplied by tiles. Those in
Q5_0 do too, but are faster with tiles from three tokens on."""
_REQUANTIZED = "its weights were made Q8_0, for which the library has kernels of several tokens"
_BYTES_PER_KV_VALUE = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}


def prepare(spec: ModelSpec, source: Path, reason: str, cache_dir: Path) -> BatchModel | EmbeddingModel:
    """Check a GGUF file, and requantize it where that pays. Slow on the first time. Raises ModelFileError."""
    header = gguf.read(source)
    architecture = header.get("general.architecture", str) or ""
    context_length = choose_context_length(spec, source, header.get(f"{architecture}.context_length", int) or 0)
    repack = not probe.no_repack_note(cache_dir).exists()
    if embed_model.is_wanted(spec, header):
        return embed_model.on_llamacpp(spec, source, header, context_length, repack, reason)
    if requantize.is_wanted(spec, header, repack) and (path := requantize.requantize(source, cache_dir)) != source:
        reason = f"{reason}; {_REQUANTIZED}"
        return BatchModel(spec, path, gguf.read(path), context_length, repack, reason)
    return BatchModel(spec, source, header, context_length, repack, reason)


@dataclass(frozen=True, slots=True)
class BatchModel:
    """A model whose file is here. `repack`: see `LlamaCppSettings`."""

    spec: ModelSpec
    path: Path
    header: GGUFFile
    context_length: int
    repack: bool
    reason: str

    @property
    def trial(self) -> Trial:
        return Trial("llamacpp", self.context_length, repack=self.repack)

    def fallback(self, cache_dir: Path) -> tuple[BatchModel, Path] | None:
        """There are machines on which the library dies of repacked weights."""
        return (replace(self, repack=False), probe.no_repack_note(cache_dir)) if self.repack else None

    def tokenizer(self) -> None:
        """It has none that needs no library."""

    def vectors(self, tokenizer: Tokenizer, dimensions: int | None) -> None:
        """It makes text."""

    def open(self, budget: ComputeBudget, statistics: StatisticsCounter, *, reads_text: bool = True) -> Engine:
        """Load the model; without what reads text, if the engine is to be given token ids only. Raises ModelFileError."""
        spec = self.spec
        settings = LlamaCppSettings(spec.kv_type, spec.flash_attention, spec.gpu_layers, self.repack, self._tiles_from)
        batch_size = max(MOST_CHUNKS * round_up_to_grid(spec.prefill_chunk, LlamaCppBackend.grid), spec.slots)
        try:
            backend = LlamaCppBackend(self.path, self.context_length, spec.slots, batch_size, settings)
        except RuntimeError as error:
            raise ModelFileError(f"{self.path.name} cannot be loaded: {error}.") from error
        try:
            tokenizer = make_tokenizer(self.header, backend)
            return BatchEngine(
                info=self.info,
                backend=backend,
                tokenizer=tokenizer,
                chat_template=make_chat_template(spec, self.header, tokenizer) if reads_text else ChatTemplate(None),
                budget=budget,
                settings=self.settings
                if backend.can_truncate
                else replace(self.settings, prefix_cache=False, prompt_lookup=False),
                statistics=statistics,
            )
        except BaseException:
            backend.close()
            raise

    @property
    def settings(self) -> EngineSettings:
        spec = self.spec
        return EngineSettings(spec.max_waiting, spec.prefill_chunk, spec.prefix_cache, spec.prompt_lookup)

    @property
    def info(self) -> EngineInfo:
        spec = self.spec
        library = f"llama-cpp-python {version('llama_cpp_python')}"
        shape = (
            identity(self.path),
            self.context_length,
            spec.chat_template,
            spec.kv_type,
            spec.flash_attention,
            self.repack,
            library,
        )
        return EngineInfo(
            identity=fingerprint(*shape),
            name="llamacpp",
            reason=probe.explain(self.reason, self.trial),
            context_length=self.context_length,
            num_slots=spec.slots,
            weights_bytes=self.header.size,
            kv_cache_bytes=self._kv_cache_bytes,
        )

    @property
    def _tiles_from(self) -> int:
        """As of `LlamaCppSettings`. Plain attention is rounded by tiles as well; kernels of ours never ask for them, and keep no other model waiting."""
        spec = self.spec
        fused = spec.flash_attention == "on" or (spec.flash_attention == "auto" and spec.gpu_layers == 0)
        types = {tensor.type.name for tensor in self.header.tensors if len(tensor.shape) > 1}
        ours = types <= matmul.OURS and self.repack and matmul.process.will_have_kernels()
        return TILES_FROM if fused and types <= _EXACT and not ours else 0

    @property
    def _kv_cache_bytes(self) -> int:
        """Of all slots together: keys and values of every layer, whose numbers of heads may differ."""
        architecture = self.header.get("general.architecture", str)

        def value(name: str, default: object) -> object:
            return self.header.metadata.get(f"{architecture}.{name}", default)

        num_layers = _number(value("block_count", 0))
        heads = _numbers(value("attention.head_count", 1), num_layers)
        kv_heads = _numbers(value("attention.head_count_kv", heads), num_layers)
        length = _number(value("embedding_length", 0)) // max(1, *heads, 1)
        width = _number(value("attention.key_length", length)) + _number(value("attention.value_length", length))
        per_token = sum(kv_heads) * width * _BYTES_PER_KV_VALUE[self.spec.kv_type]
        return int(self.spec.slots * self.context_length * per_token)


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _numbers(value: object, count: int) -> tuple[int, ...]:
    """One for each layer."""
    return tuple(map(_number, value)) if isinstance(value, tuple) else (_number(value),) * count


def make_tokenizer(header: GGUFFile, backend: LlamaCppBackend, tokenize_whole: TokenizeText | None = None) -> LibraryTokenizer:
    vocabulary = Vocabulary.from_library(
        header.metadata,
        pieces=map(backend.piece, range(backend.vocab_size)),
        ends=filter(backend.is_end, range(backend.vocab_size)),
        bos_token_id=backend.bos_token_id,
        add_bos=backend.add_bos,
    )
    return LibraryTokenizer(vocabulary, text_by_text(backend.tokenize, backend.tokenize, tokenize_whole))
