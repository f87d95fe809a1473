"""Tiny real model files with seeded random weights, and broken ones: paths in, files out. Uses nothing of llmserve.

Every valid file is below 2 MB and loads in milliseconds. The rows of control tokens are small, so their logits stay
near 0, where greedy decoding does not land: a greedy answer ends by its length.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Quantization
from gguf.quants import quantize
from numpy.typing import NDArray

CONTEXT_LENGTH = 256
NUM_LAYERS = 2
NUM_HEADS = 4
NUM_KV_HEADS = 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # tokenizer.ggml.token_type
INFILL_TOKENS = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]

WORDS = "hello world the river runs to sea and user assistant system what is a poem about stop".split()
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPM_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

Keys = Mapping[str, Any]
Weights = dict[str, NDArray[np.float32]]
Changes = Mapping[str, NDArray[Any] | None]
NONE: Mapping[str, Any] = {}

SCALES: Mapping[Quantization, Mapping[int, float]] = {
    # For the types that gguf cannot make: float16 values by their offset in a block (ggml's ggml-quants.h), such that
    # random bits around them give weights of mean 0 and deviation 1/16.
    Quantization.Q2_K: {80: 5e-3, 82: 7.5e-3},
    Quantization.Q3_K: {108: 1.5e-3},
    Quantization.Q4_K: {0: 2.5e-4, 2: 1.9e-3},
    Quantization.Q5_K: {0: 1.2e-4, 2: 1.9e-3},
    Quantization.Q6_K: {208: 5e-5},
    Quantization.IQ4_NL: {0: 1e-3},
    Quantization.IQ4_XS: {0: 3e-5},
}


@dataclass(frozen=True)
class GGMLLayout:
    """Hyperparameters in order, and tensors as NAME:SHAPE, of the model and of each layer.

    A shape is of rows and columns, each v(ocabulary), c(ontext) or so many widths.
    """

    header: str
    tensors: str
    layer: str
    layer_tensors: str
    scores: bool = False


_GPT_2 = GGMLLayout(
    "vocab context width heads layers ftype vocab",
    "model/ln_f/g:1 model/ln_f/b:1 model/wte:v1 model/wpe:c1",
    "model/h{}/",
    "ln_1/g:1 ln_1/b:1 ln_2/g:1 ln_2/b:1 attn/c_attn/w:31 attn/c_attn/b:3 attn/c_proj/w:11 attn/c_proj/b:1 "
    "mlp/c_fc/w:41 mlp/c_fc/b:4 mlp/c_proj/w:14 mlp/c_proj/b:1",
)
_GPT_NEOX = GGMLLayout(
    "vocab context width heads layers rotary parallel ftype",
    "gpt_neox.embed_in.weight:v1 gpt_neox.final_layer_norm.weight:1 gpt_neox.final_layer_norm.bias:1 embed_out.weight:v1",
    "gpt_neox.layers.{}.",
    "input_layernorm.weight:1 input_layernorm.bias:1 post_attention_layernorm.weight:1 post_attention_layernorm.bias:1 "
    "attention.query_key_value.weight:31 attention.query_key_value.bias:3 attention.dense.weight:11 attention.dense.bias:1 "
    "mlp.dense_h_to_4h.weight:41 mlp.dense_h_to_4h.bias:4 mlp.dense_4h_to_h.weight:14 mlp.dense_4h_to_h.bias:1",
)
_MPT = GGMLLayout(
    "width context heads layers vocab alibi clip ftype",
    "transformer.wte.weight:v1 transformer.norm_f.weight:1",
    "transformer.blocks.{}.",
    "norm_1.weight:1 attn.Wqkv.weight:31 attn.out_proj.weight:11 norm_2.weight:1 ffn.up_proj.weight:41 ffn.down_proj.weight:14",
)
GGML_LAYOUTS = {
    "dolly": _GPT_NEOX,
    "gpt2": _GPT_2,
    "gpt_neox": _GPT_NEOX,
    "gptj": GGMLLayout(
        "vocab context width heads layers rotary ftype vocab",
        "transformer.wte.weight:v1 transformer.ln_f.weight:1 transformer.ln_f.bias:1 lm_head.weight:v1 lm_head.bias:v",
        "transformer.h.{}.",
        "ln_1.weight:1 ln_1.bias:1 attn.q_proj.weight:11 attn.k_proj.weight:11 attn.v_proj.weight:11 attn.out_proj.weight:11 "
        "mlp.fc_in.weight:41 mlp.fc_in.bias:4 mlp.fc_out.weight:14 mlp.fc_out.bias:1",
    ),
    "mpt": _MPT,
    "replit": replace(_MPT, header="width context heads layers vocab ftype", scores=True),
    "starcoder": _GPT_2,
}


def write_llama_spm(
    path: Path,
    *,
    seed: int = 0,
    quantization: Quantization = Quantization.F32,
    keys: Keys = NONE,
    tensors: Changes = NONE,
) -> Path:
    """A llama with a SentencePiece vocabulary, as files of 2023 are. ctransformers loads it as it is.

    `keys` and `tensors` replace what the file would hold, or add to it; None leaves the named one out.
    """
    tokenizer = _spm_tokenizer()
    weights = _llama_weights(seed, tokenizer["tokenizer.ggml.token_type"], _width(quantization))
    hyperparameters = _hyperparameters("llama", _width(quantization), NUM_KV_HEADS)
    return _write_gguf(path, {**hyperparameters, **tokenizer, **keys}, {**weights, **tensors}, quantization)


def write_llama_bpe(
    path: Path,
    *,
    tied: bool = True,
    seed: int = 0,
    quantization: Quantization = Quantization.F32,
    keys: Keys = NONE,
    tensors: Changes = NONE,
) -> Path:
    """A llama with a GPT-2 style vocabulary and, if `tied`, no output.weight, as SmolLM2 is; the rest as above."""
    tokenizer = _bpe_tokenizer()
    weights = _llama_weights(seed, tokenizer["tokenizer.ggml.token_type"], _width(quantization))
    if tied:
        del weights["output.weight"]
    hyperparameters = _hyperparameters("llama", _width(quantization), NUM_KV_HEADS)
    return _write_gguf(path, {**hyperparameters, **tokenizer, **keys}, {**weights, **tensors}, quantization)


def write_infill(path: Path, *, kind: int = CONTROL, seed: int = 0) -> Path:
    """A llama whose vocabulary has Qwen's tokens for what stands before and behind a gap, of this type; the rest as above."""
    tokenizer = _bpe_tokenizer()
    tokenizer["tokenizer.ggml.tokens"] += INFILL_TOKENS
    tokenizer["tokenizer.ggml.token_type"] += [kind] * len(INFILL_TOKENS)
    weights = _llama_weights(seed, tokenizer["tokenizer.ggml.token_type"], _width(Quantization.F32))
    return _write_gguf(path, {**_hyperparameters("llama", 64, NUM_KV_HEADS), **tokenizer}, weights, Quantization.F32)


def write_falcon_bpe(
    path: Path,
    *,
    two_norms: bool = False,
    seed: int = 0,
    quantization: Quantization = Quantization.F32,
    keys: Keys = NONE,
    tensors: Changes = NONE,
) -> Path:
    """A falcon as the 7B is, or as the 40B with `two_norms`; the rest as above."""
    num_kv_heads = NUM_KV_HEADS if two_norms else 1
    tokenizer = _bpe_tokenizer()
    weights = _falcon_weights(seed, tokenizer["tokenizer.ggml.token_type"], _width(quantization), num_kv_heads)
    if not two_norms:
        weights = {name: weight for name, weight in weights.items() if "attn_norm_2" not in name}
    hyperparameters = _hyperparameters("falcon", _width(quantization), num_kv_heads)
    return _write_gguf(path, {**hyperparameters, **tokenizer, **keys}, {**weights, **tensors}, quantization)


def write_modern(path: Path, architecture: str, *, seed: int = 0) -> Path:
    """A model of an architecture that came after ctransformers: qwen2, qwen3 or gemma3. Tied, with the byte-level vocabulary."""
    tokenizer, width = _bpe_tokenizer(), _width(Quantization.F32)
    rng = np.random.default_rng(seed)
    weights = _llama_weights(seed, tokenizer["tokenizer.ggml.token_type"], width)
    del weights["output.weight"]
    head, kv_width = width // NUM_HEADS, width // NUM_HEADS * NUM_KV_HEADS
    for i in range(NUM_LAYERS):
        if architecture == "qwen2":
            sizes = {"q": width, "k": kv_width, "v": kv_width}
            weights |= {f"blk.{i}.attn_{name}.bias": _bias(rng, size) for name, size in sizes.items()}
        else:
            weights |= {f"blk.{i}.attn_{name}_norm.weight": _norm(rng, head) for name in "qk"}
        if architecture == "gemma3":
            weights |= {f"blk.{i}.post_{name}_norm.weight": _norm(rng, width) for name in ("attention", "ffw")}
    hyperparameters = _hyperparameters(architecture, width, NUM_KV_HEADS) | {
        f"{architecture}.attention.key_length": head,
        f"{architecture}.attention.value_length": head,
        f"{architecture}.attention.sliding_window": 32 if architecture == "gemma3" else None,
    }
    return _write_gguf(path, {**hyperparameters, **tokenizer}, weights, Quantization.F32)


def write_bert(path: Path, *, pooling: int = 1, seed: int = 0, keys: Keys = NONE) -> Path:
    """A BERT, which makes vectors only, with a WordPiece vocabulary. `pooling` is of enum llama_pooling_type."""
    width, rng = 64, np.random.default_rng(seed)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(97, 123)]
    tokens = list(dict.fromkeys([*special, *(f"▁{word}" for word in [*WORDS, *letters]), *letters]))
    weights: Weights = {
        "token_embd.weight": _matrix(rng, len(tokens), width),
        "token_types.weight": _matrix(rng, 2, width),
        "position_embd.weight": _matrix(rng, CONTEXT_LENGTH, width),
        "token_embd_norm.weight": _norm(rng, width),
        "token_embd_norm.bias": _bias(rng, width),
    }
    shapes = {"attn_q": (width, width), "attn_k": (width, width), "attn_v": (width, width), "attn_output": (width, width)}
    shapes |= {"ffn_up": (2 * width, width), "ffn_down": (width, 2 * width)}
    for i in range(NUM_LAYERS):
        for name, shape in shapes.items():
            weights |= {f"blk.{i}.{name}.weight": _matrix(rng, *shape), f"blk.{i}.{name}.bias": _bias(rng, shape[0])}
        for name in ("attn_output_norm", "layer_output_norm"):
            weights |= {f"blk.{i}.{name}.weight": _norm(rng, width), f"blk.{i}.{name}.bias": _bias(rng, width)}
    header = {
        "general.architecture": "bert",
        "bert.context_length": CONTEXT_LENGTH,
        "bert.embedding_length": width,
        "bert.block_count": NUM_LAYERS,
        "bert.feed_forward_length": 2 * width,
        "bert.attention.head_count": NUM_HEADS,
        "bert.attention.layer_norm_epsilon": 1e-5,
        "bert.attention.causal": False,
        "bert.pooling_type": pooling,
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL] * len(special) + [NORMAL] * (len(tokens) - len(special)),
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.cls_token_id": 2,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.mask_token_id": 4,
    }
    return _write_gguf(path, {**header, **keys}, weights, Quantization.F32)


def write_ggml_gpt2(path: Path, *, seed: int = 0) -> Path:
    """A GPT-2 in the format before GGUF: ctransformers loads it with model_type="gpt2"."""
    return write_ggml(path, "gpt2", seed=seed)


def write_ggml(path: Path, model_type: str, *, seed: int = 0, **changes: int) -> Path:
    """A model in the format before GGUF (ggml's examples of mid-2023), which does not say of which type it is.

    `changes` replace hyperparameters, named as in `GGMLLayout`.
    """
    layout = GGML_LAYOUTS[model_type]
    tokens = _ggml_tokens(model_type)
    sizes = {"vocab": len(tokens), "context": CONTEXT_LENGTH, "width": 64, "heads": NUM_HEADS, "layers": NUM_LAYERS}
    sizes |= {"rotary": 64 // NUM_HEADS, "parallel": 1, "clip": 0, "ftype": 0, **changes}  # ftype 0: all float32
    with path.open("wb") as file:
        file.write(b"lmgg")
        for name in layout.header.split():
            file.write(struct.pack("<f", 8.0) if name == "alibi" else struct.pack("<i", sizes[name]))
        for rank, token in enumerate(tokens):
            file.write(struct.pack("<i", len(token)) + token + (struct.pack("<f", -rank) if layout.scores else b""))
        for name, weight in _ggml_weights(layout, np.random.default_rng(seed), sizes):
            file.write(struct.pack("<3i", weight.ndim, len(name), 0))
            file.write(struct.pack(f"<{weight.ndim}i", *reversed(weight.shape)) + name.encode() + weight.tobytes())
    return path


def broken_files(folder: Path, good: Path) -> dict[str, Path]:
    """Files that cannot be served, by what is wrong with them. `good` is a GGUF; its file format is broken in most of them."""
    data = good.read_bytes()
    header_size = data.rindex(b".weight")  # up to the last tensor's name
    contents = {
        "empty": b"",
        "text": b"This is not a model.\n" * 100,
        "html": b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n",
        "zip": b"PK\x03\x04" + bytes(1000),
        "half": data[: len(data) // 2],
        "cut_header": data[: header_size // 2],
    }
    contents |= {f"flipped_{seed}": _flip(data, header_size, seed) for seed in range(6)}
    files = {name: folder / f"{name}.gguf" for name in ("missing", *contents)}
    for name, content in contents.items():
        files[name].write_bytes(content)
    files["architecture"] = write_llama_spm(folder / "architecture.gguf", keys={"general.architecture": "qwen2"})
    files["quantization"] = write_llama_spm(folder / "quantization.gguf", quantization=Quantization.IQ4_NL)
    return files


def spm_vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types: control tokens, all bytes, every prefix of each word with its space, and printable ASCII."""
    prefixes = [f"▁{word}"[:length] for word in WORDS for length in range(2, len(word) + 2)]
    pieces = list(dict.fromkeys([*prefixes, "▁", *map(chr, range(33, 127))]))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    scores = [0.0] * (len(tokens) - len(pieces)) + [-float(rank) for rank in range(len(pieces))]
    return tokens, scores, [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces)


def bpe_vocabulary() -> tuple[list[str], list[str], list[int]]:
    """Tokens, merges and types: control tokens, the 256 byte-level characters, and the words, merged from their left ends."""
    prefixes = _byte_level_prefixes()
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BYTE_LEVEL.values(), *prefixes]
    return tokens, [f"{prefix[:-1]} {prefix[-1]}" for prefix in prefixes], [CONTROL] * 3 + [NORMAL] * (len(tokens) - 3)


def _spm_tokenizer() -> dict[str, Any]:
    tokens, scores, types = spm_vocabulary()
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": SPM_TEMPLATE,
    }


def _bpe_tokenizer() -> dict[str, Any]:
    tokens, merges, types = bpe_vocabulary()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }


def _byte_level() -> dict[int, str]:
    """GPT-2's printable character for each byte (encoder.py of openai/gpt-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_LEVEL = _byte_level()


def _byte_level_prefixes() -> list[str]:
    words = [f"{BYTE_LEVEL[ord(' ')]}{word}" for word in WORDS]
    return list(dict.fromkeys(word[:length] for word in words for length in range(2, len(word) + 1)))


def _from_byte_level(token: str) -> bytes:
    byte = {character: byte for byte, character in BYTE_LEVEL.items()}
    return bytes(byte[character] for character in token)


def _hyperparameters(architecture: str, width: int, num_kv_heads: int) -> dict[str, Any]:
    epsilon = "layer_norm_epsilon" if architecture == "falcon" else "layer_norm_rms_epsilon"
    return {
        "general.architecture": architecture,
        "general.name": "tiny",
        "general.languages": ["en"],
        f"{architecture}.context_length": CONTEXT_LENGTH,
        f"{architecture}.embedding_length": width,
        f"{architecture}.block_count": NUM_LAYERS,
        f"{architecture}.feed_forward_length": 2 * width,
        f"{architecture}.attention.head_count": NUM_HEADS,
        f"{architecture}.attention.head_count_kv": num_kv_heads,
        f"{architecture}.attention.{epsilon}": 1e-5,
        f"{architecture}.rope.dimension_count": width // NUM_HEADS,
        f"{architecture}.rope.freq_base": 10000.0,
    }


def _width(quantization: Quantization) -> int:
    return max(64, GGML_QUANT_SIZES[quantization][0])  # rows are made of whole blocks


def _llama_weights(seed: int, types: list[int], width: int) -> Weights:
    rng = np.random.default_rng(seed)
    kv_width = width // NUM_HEADS * NUM_KV_HEADS
    weights = _embedding_and_head(rng, types, width)
    for i in range(NUM_LAYERS):
        weights |= {
            f"blk.{i}.attn_norm.weight": _norm(rng, width),
            f"blk.{i}.attn_q.weight": _matrix(rng, width, width),
            f"blk.{i}.attn_k.weight": _matrix(rng, kv_width, width),
            f"blk.{i}.attn_v.weight": _matrix(rng, kv_width, width),
            f"blk.{i}.attn_output.weight": _matrix(rng, width, width),
            f"blk.{i}.ffn_norm.weight": _norm(rng, width),
            f"blk.{i}.ffn_gate.weight": _matrix(rng, 2 * width, width),
            f"blk.{i}.ffn_up.weight": _matrix(rng, 2 * width, width),
            f"blk.{i}.ffn_down.weight": _matrix(rng, width, 2 * width),
        }
    return weights


def _falcon_weights(seed: int, types: list[int], width: int, num_kv_heads: int) -> Weights:
    rng = np.random.default_rng(seed)
    qkv_width = width // NUM_HEADS * (NUM_HEADS + 2 * num_kv_heads)
    weights = _embedding_and_head(rng, types, width) | {"output_norm.bias": _bias(rng, width)}
    for i in range(NUM_LAYERS):
        weights |= {
            f"blk.{i}.attn_norm.weight": _norm(rng, width),
            f"blk.{i}.attn_norm.bias": _bias(rng, width),
            f"blk.{i}.attn_norm_2.weight": _norm(rng, width),
            f"blk.{i}.attn_norm_2.bias": _bias(rng, width),
            f"blk.{i}.attn_qkv.weight": _matrix(rng, qkv_width, width),
            f"blk.{i}.attn_output.weight": _matrix(rng, width, width),
            f"blk.{i}.ffn_up.weight": _matrix(rng, 2 * width, width),
            f"blk.{i}.ffn_down.weight": _matrix(rng, width, 2 * width),
        }
    return weights


def _ggml_tokens(model_type: str) -> list[bytes]:
    """The vocabulary in the spelling of each type's converter."""
    tokens = [*map(_from_byte_level, [*BYTE_LEVEL.values(), *_byte_level_prefixes()]), b"<|endoftext|>"]
    if model_type == "mpt":  # a character for each byte
        return [token.decode("latin-1").encode() for token in tokens]
    if model_type == "replit":
        return [token.replace(b" ", "▁".encode()) for token in tokens]
    return tokens


def _ggml_weights(
    layout: GGMLLayout, rng: np.random.Generator, sizes: Mapping[str, int]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    widths = {str(factor): factor * sizes["width"] for factor in (1, 3, 4)}
    layers = [f"{layout.layer.format(i)}{tensor}" for i in range(sizes["layers"]) for tensor in layout.layer_tensors.split()]
    for tensor in (*layout.tensors.split(), *layers):
        name, _, shape = tensor.partition(":")
        lengths = [{"v": sizes["vocab"], "c": sizes["context"], **widths}[letter] for letter in shape]
        if len(lengths) == 2:
            yield name, _matrix(rng, *lengths)
        else:
            yield name, (_bias if name.endswith(("/b", "bias")) else _norm)(rng, *lengths)


def _embedding_and_head(rng: np.random.Generator, types: list[int], width: int) -> Weights:
    rows = np.where(np.isin(types, (CONTROL, UNKNOWN)), 0.05, 1).astype(np.float32)[:, None]
    return {
        "token_embd.weight": rows * _matrix(rng, len(types), width),
        "output_norm.weight": _norm(rng, width),
        "output.weight": rows * _matrix(rng, len(types), width) * 4,
    }


def _matrix(rng: np.random.Generator, rows: int, columns: int) -> NDArray[np.float32]:
    return rng.standard_normal((rows, columns), dtype=np.float32) / np.float32(columns**0.5)


def _norm(rng: np.random.Generator, length: int) -> NDArray[np.float32]:
    return 1 + _bias(rng, length)


def _bias(rng: np.random.Generator, length: int) -> NDArray[np.float32]:
    return rng.standard_normal(length, dtype=np.float32) / np.float32(10)


def _write_gguf(path: Path, keys: Keys, tensors: Changes, quantization: Quantization) -> Path:
    writer = GGUFWriter(path, keys["general.architecture"])
    for key, value in keys.items():
        if value is not None and key != "general.architecture":  # which the writer has put there
            _add_key(writer, key, value)
    for name, tensor in tensors.items():
        if tensor is not None:
            vector_type = Quantization.F16 if tensor.dtype == np.float16 else Quantization.F32
            _add_tensor(writer, name, tensor, quantization if tensor.ndim == 2 else vector_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_key(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, int) and not isinstance(value, bool):
        writer.add_uint32(key, value)  # every integer that llama.cpp asks for is one
    else:
        writer.add_key_value(key, value, GGUFValueType.get_type(value))


def _add_tensor(writer: GGUFWriter, name: str, tensor: NDArray[Any], quantization: Quantization) -> None:
    data = _random_blocks(tensor, quantization) if quantization in SCALES else quantize(tensor, quantization)
    writer.add_tensor(name, data, raw_dtype=quantization)


def _random_blocks(tensor: NDArray[np.float32], quantization: Quantization) -> NDArray[np.uint8]:
    """Random bits, seeded by the tensor's values, in the place of its quantized values."""
    block_size, block_bytes = GGML_QUANT_SIZES[quantization]
    rng = np.random.default_rng(np.frombuffer(tensor[0].tobytes(), np.uint32))
    blocks = rng.integers(0, 256, (tensor.size // block_size, block_bytes), dtype=np.uint8)
    for offset, scale in SCALES[quantization].items():
        blocks[:, offset : offset + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return blocks.reshape(len(tensor), -1)


def _flip(data: bytes, header_size: int, seed: int) -> bytes:
    """Twenty inverted bytes at random places of the header."""
    flipped = bytearray(data)
    for position in random.Random(seed).sample(range(header_size), 20):
        flipped[position] ^= 0xFF
    return bytes(flipped)
