"""Make a GGUF file of today one that ctransformers 0.2.27 runs right, or say why that cannot be.

What that library knows, and what it does about the rest (fail, ignore it, kill the process), was found by loading files
of each kind; tests/models/test_adapt.py does it again. Weights are never changed, source files never written.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from llmserve.engine.gguf import GGUFFile, Strings, TensorInfo, Value, ValueType, pack_header
from llmserve.errors import ModelFileError
from llmserve.models.files import derived

ADAPTER_VERSION = 2
"""Goes up when `adapt` begins to write other files than before."""

Shape = tuple[int, ...]

_CHUNK = 4 * 1024**2  # bytes copied at a time

_ARCHITECTURES = {"llama": "attention.layer_norm_rms_epsilon", "falcon": "attention.layer_norm_epsilon"}
"""What the library can run, and the hyperparameter that each alone needs."""

_REQUIRED = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count")

_READ_BY_LIBRARY = {
    **dict.fromkeys((*_REQUIRED, "attention.head_count_kv", "rope.dimension_count"), ValueType.UINT32),
    **dict.fromkeys((*_ARCHITECTURES.values(), "rope.freq_base", "rope.scale_linear"), ValueType.FLOAT32),
}
"""Hyperparameters and the types they must have, or the library fails."""

_CHECKED_HERE = frozenset(
    {
        "attention.key_length",
        "attention.value_length",
        "attention.sliding_window",
        "attention.causal",
        "expert_count",
        "expert_used_count",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "tensor_data_layout",
        "vocab_size",
    }
)
"""Hyperparameters that the library ignores, which is right for some of their values. All others are refused unseen."""

_TENSOR_TYPES = frozenset(
    {"F32", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"},
)

_SPECIAL_IDS = {"bos": 1, "eos": 2, "unknown": 0, "seperator": None, "padding": None}  # as GGUF spells them
"""The special tokens that the library looks up, killing the process if they do not exist, and what it takes for missing ones."""

_NO_ID = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Adaptation:
    """What to change. `add_output`: the embeddings are tied, and the library must be told that they are the output too.

    `replace_tokenizer`: the library would crash in its GPT-2 style tokenizer; it gets placeholders, and the tokenizer must
    be built from the source's header.
    """

    add_output: bool = False
    replace_tokenizer: bool = False


def plan(gguf: GGUFFile, context_length: int) -> Adaptation:
    """What to change for the library to run the model right with `context_length` tokens. Raises ModelFileError if it cannot."""
    model = _hyperparameters(gguf)
    _check_extensions(gguf, model, context_length)
    tensors = {tensor.name: tensor for tensor in gguf.tensors}
    _check_tensors(tensors, _expected_shapes(model, tensors))
    _check_special_ids(gguf, model.vocab_size)
    add_output = "output.weight" not in tensors
    tokenizer = _text(gguf, "tokenizer.ggml.model")
    if tokenizer == "gpt2":
        return Adaptation(add_output, replace_tokenizer=True)
    if tokenizer != "llama":
        raise _unsupported(f"its tokenizer is of the kind {tokenizer!r}")
    _check_spm(gguf, model.vocab_size)
    return Adaptation(add_output)


def adapt(source: Path, gguf: GGUFFile, adaptation: Adaptation, cache_dir: Path) -> Path:
    """The file to load: `source`, or a changed copy of it in `cache_dir`, made once. Raises ModelFileError.

    `gguf` is the header of `source`. Threads and processes may adapt the same file at once: one copies, the others wait.
    """
    if adaptation == Adaptation():
        return source
    recipe = (ADAPTER_VERSION, adaptation)
    try:
        return derived(source, cache_dir / "adapted", recipe, partial(_copy, source, _changed(gguf, adaptation)))
    except OSError as error:
        raise ModelFileError(f"{source.name} cannot be adapted for ctransformers: {error.strerror or error}.") from error


@dataclass(frozen=True, slots=True)
class _Hyperparameters:
    architecture: str
    width: int
    feed_forward_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads


def _hyperparameters(gguf: GGUFFile) -> _Hyperparameters:
    architecture = _text(gguf, "general.architecture")
    if (num_parts := gguf.get("split.count", int) or 1) > 1:
        raise ModelFileError(f"The file is one of {num_parts} parts of a model; merge them with llama-gguf-split --merge.")
    if architecture not in _ARCHITECTURES:
        raise _unsupported(f"its architecture is {architecture!r}")
    _check_keys(gguf, architecture)
    context_length, width, num_layers, feed_forward_width, num_heads = (
        gguf.get(f"{architecture}.{name}", int) or 0 for name in _REQUIRED
    )
    num_kv_heads = gguf.get(f"{architecture}.attention.head_count_kv", int)
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if not (context_length and width and num_layers and num_heads and num_kv_heads):
        raise _damaged("a hyperparameter is 0")
    if width % num_heads or num_heads % num_kv_heads or width // num_heads % 2:
        raise _damaged(f"its width of {width} cannot be divided over {num_heads} heads and {num_kv_heads} KV heads")
    tokens = _array(gguf, "tokenizer.ggml.tokens", ValueType.STRING)
    return _Hyperparameters(architecture, width, feed_forward_width, num_layers, num_heads, num_kv_heads, len(tokens))


def _check_keys(gguf: GGUFFile, architecture: str) -> None:
    prefix = f"{architecture}."
    for name in (*_REQUIRED, _ARCHITECTURES[architecture]):
        if prefix + name not in gguf.metadata:
            raise _damaged(f"{prefix}{name} is missing")
    for key, value in gguf.metadata.items():
        if not key.startswith(prefix):
            continue
        name = key.removeprefix(prefix)
        if name not in _READ_BY_LIBRARY and name not in _CHECKED_HERE:
            raise _unsupported(f"it has the hyperparameter {key!r}")
        if isinstance(value, tuple | Strings):
            raise _unsupported(f"its {key} differs from layer to layer")
        if name in _READ_BY_LIBRARY and gguf.types[key] is not _READ_BY_LIBRARY[name]:
            raise _damaged(f"{key} is of the type {gguf.types[key].name}")


def _check_extensions(gguf: GGUFFile, model: _Hyperparameters, context_length: int) -> None:
    """Refuse what the library would ignore, giving wrong answers without a word."""
    prefix = model.architecture
    scaling = gguf.get(f"{prefix}.rope.scaling.type", str)
    factor = gguf.get(f"{prefix}.rope.scaling.factor", float)
    if scaling != "none" and (scaling not in (None, "linear") or factor not in (None, 0, 1)):
        raise _unsupported(f"it has rope scaling ({scaling!r}, factor {factor})")
    window = gguf.get(f"{prefix}.attention.sliding_window", int)
    if window and window < context_length:
        raise _unsupported(f"its sliding window of {window} tokens is shorter than the context of {context_length}")
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        length = gguf.get(f"{prefix}.{name}", int)
        if length not in (None, model.head_width):
            raise _unsupported(f"its {name} is {length}, and embedding_length / head_count is {model.head_width}")
    if gguf.get(f"{prefix}.expert_count", int):
        raise _unsupported("it is a mixture of experts")
    if gguf.get(f"{prefix}.attention.causal", bool) is False:
        raise _unsupported("its attention is not causal")


def _expected_shapes(model: _Hyperparameters, tensors: Mapping[str, TensorInfo]) -> dict[str, Shape]:
    """Exactly what the library asks for; it fails at any other tensor."""
    if model.num_layers > len(tensors):  # checked before that many names are made
        raise _damaged(f"it has {len(tensors)} tensors for {model.num_layers} layers")
    falcon = model.architecture == "falcon"
    shapes: dict[str, Shape] = {
        "token_embd.weight": (model.width, model.vocab_size),
        "output_norm.weight": (model.width,),
    }
    if falcon:
        shapes["output_norm.bias"] = (model.width,)
    if "output.weight" in tensors:
        shapes["output.weight"] = (model.width, model.vocab_size)
    for i in range(model.num_layers):
        two_norms = f"blk.{i}.attn_norm_2.weight" in tensors
        layer = _falcon_layer(model, two_norms) if falcon else _llama_layer(model)
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def _llama_layer(model: _Hyperparameters) -> dict[str, Shape]:
    width, kv_width = model.width, model.head_width * model.num_kv_heads
    return {
        "attn_norm.weight": (width,),
        "attn_q.weight": (width, width),
        "attn_k.weight": (width, kv_width),
        "attn_v.weight": (width, kv_width),
        "attn_output.weight": (width, width),
        "ffn_norm.weight": (width,),
        "ffn_gate.weight": (width, model.feed_forward_width),
        "ffn_up.weight": (width, model.feed_forward_width),
        "ffn_down.weight": (model.feed_forward_width, width),
    }


def _falcon_layer(model: _Hyperparameters, two_norms: bool) -> dict[str, Shape]:
    width = model.width
    norms = ("attn_norm", "attn_norm_2") if two_norms else ("attn_norm",)
    return {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")} | {
        "attn_qkv.weight": (width, width + 2 * model.head_width * model.num_kv_heads),
        "attn_output.weight": (width, width),
        "ffn_up.weight": (width, model.feed_forward_width),
        "ffn_down.weight": (model.feed_forward_width, width),
    }


def _check_tensors(tensors: Mapping[str, TensorInfo], shapes: Mapping[str, Shape]) -> None:
    for name in tensors:
        if name not in shapes:
            raise _unsupported(f"it has the tensor {name!r}")
    for name, shape in shapes.items():
        if name not in tensors:
            raise _damaged(f"the tensor {name} is missing")
        tensor = tensors[name]
        if tensor.shape != shape:
            raise _damaged(f"the tensor {name} has the shape {tensor.shape}, and the header asks for {shape}")
        if tensor.type.name not in _TENSOR_TYPES or (len(shape) == 1 and tensor.type.name != "F32"):
            raise _unsupported(f"its tensor {name} is of the type {tensor.type.name}")


def _check_special_ids(gguf: GGUFFile, vocab_size: int) -> None:
    for name, default in _SPECIAL_IDS.items():
        key = f"tokenizer.ggml.{name}_token_id"
        token_id = gguf.get(key, int)
        if token_id is not None and gguf.types[key] is not ValueType.UINT32:
            raise _damaged(f"{key} is of the type {gguf.types[key].name}")
        token_id = default if token_id is None else token_id
        if token_id not in (None, _NO_ID) and token_id >= vocab_size:
            raise _damaged(f"{key} is {token_id}, and the vocabulary has {vocab_size} tokens")


def _check_spm(gguf: GGUFFile, vocab_size: int) -> None:
    for key, element_type in (("scores", ValueType.FLOAT32), ("token_type", ValueType.INT32)):
        values = _array(gguf, f"tokenizer.ggml.{key}", element_type)
        if len(values) != vocab_size:
            raise _damaged(f"tokenizer.ggml.{key} has {len(values)} values for {vocab_size} tokens")
    tokens = set(_array(gguf, "tokenizer.ggml.tokens", ValueType.STRING))
    for byte in range(256):  # a text with a missing one would kill the process
        if f"<0x{byte:02X}>" not in tokens:
            raise _unsupported(f"its vocabulary has no token for the byte <0x{byte:02X}>")


def _array(gguf: GGUFFile, key: str, element_type: ValueType) -> tuple[Value, ...] | Strings:
    values = gguf.metadata.get(key)
    if not isinstance(values, tuple | Strings) or gguf.types[key] is not element_type:
        raise _damaged(f"{key} is missing or of the wrong type")
    return values


def _text(gguf: GGUFFile, key: str) -> str:
    text = gguf.get(key, str)
    if text is None:
        raise _damaged(f"{key} is missing")
    return text


def _unsupported(reason: str) -> ModelFileError:
    return ModelFileError(f"ctransformers cannot run this model right: {reason:.200}; a current llama.cpp may.")


def _damaged(reason: str) -> ModelFileError:
    return ModelFileError(f"The file is damaged or no language model: {reason:.200}.")


def _changed(gguf: GGUFFile, adaptation: Adaptation) -> GGUFFile:
    """The header of the copy. Its output.weight lies where token_embd.weight does, so it costs neither disk nor memory."""
    metadata, types, tensors = dict(gguf.metadata), dict(gguf.types), gguf.tensors
    if adaptation.add_output:
        tensors += tuple(replace(tensor, name="output.weight") for tensor in tensors if tensor.name == "token_embd.weight")
    if adaptation.replace_tokenizer:
        placeholders = _placeholder_tokenizer(len(_array(gguf, "tokenizer.ggml.tokens", ValueType.STRING)))
        ids = {f"tokenizer.ggml.{name}_token_id" for name in _SPECIAL_IDS}
        metadata = {key: value for key, value in metadata.items() if key in ids or not key.startswith("tokenizer.")}
        metadata |= {key: value for key, (value, _) in placeholders.items()}
        types |= {key: value_type for key, (_, value_type) in placeholders.items()}
    return replace(gguf, metadata=metadata, types=types, tensors=tensors)


def _placeholder_tokenizer(vocab_size: int) -> dict[str, tuple[Value, ValueType]]:
    """The least that the library can load. It looks for the newline token at once; of equal texts its table keeps one, and
    every slot has such a table.
    """
    tokens = ("<0x0A>", *["?"] * (vocab_size - 1))
    return {
        "tokenizer.ggml.model": ("llama", ValueType.STRING),
        "tokenizer.ggml.tokens": (tokens, ValueType.STRING),
        "tokenizer.ggml.scores": ((0.0,) * vocab_size, ValueType.FLOAT32),
        "tokenizer.ggml.token_type": ((1,) * vocab_size, ValueType.INT32),
    }


def _copy(source: Path, gguf: GGUFFile, target: Path) -> None:
    """Write `gguf` and the data of `source` to `target`."""
    with open(source, "rb") as data, open(target, "wb") as out:
        out.write(pack_header(gguf))
        data.seek(gguf.data_offset)
        shutil.copyfileobj(data, out, _CHUNK)
    if source.stat().st_size != gguf.size:
        raise ModelFileError(f"{source.name} was changed while it was read.")
