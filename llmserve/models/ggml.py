"""Read GGML files, the format before GGUF, as far as memory and context go: a path and the model's type in, facts out.

Such a file does not say of which type it is: a magic, bare hyperparameters in an order of the type's own, the vocabulary,
then tensors up to the end. ctransformers takes whatever is there and makes up a half that is missing, so it is made sure
here that the file is whole. Format: ggml's examples of mid-2023.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llmserve.engine.gguf import TENSOR_TYPES
from llmserve.errors import ModelFileError

_MAGIC = b"lmgg"  # "ggml" as a little-endian integer


@dataclass(frozen=True, slots=True)
class GGMLFile:
    """`library_type` is what ctransformers calls the type of the model. Sizes are in bytes."""

    library_type: str
    context_length: int
    size: int
    kv_bytes_per_token: int

    def kv_cache_bytes(self, context_length: int) -> int:
        """Of one slot: of all types, only mpt makes its cache as short as it is asked to."""
        return self.kv_bytes_per_token * (context_length if self.library_type == "mpt" else self.context_length)


def read(path: Path, model_type: str) -> GGMLFile:
    """The facts of a file that is whole. Raises ModelFileError. Tens of milliseconds."""
    layout = _LAYOUTS.get(model_type)
    if layout is None:
        raise ModelFileError(f"model_type = {model_type!r} is not supported; it can be {', '.join(_LAYOUTS)}.")
    try:
        with path.open("rb") as file:
            return _read(file, layout)
    except OSError as error:
        raise ModelFileError(f"{path.name} cannot be read: {error.strerror}.") from error
    except _NoGGML:
        raise ModelFileError(f"{path.name} is not a GGML file, which model_type = {model_type!r} says it is.") from None
    except (_Malformed, struct.error):
        raise ModelFileError(f"{path.name} is damaged or cut, or its model_type is not {model_type!r}.") from None


@dataclass(frozen=True, slots=True)
class _Layout:
    """The order of the first five hyperparameters, where in the file the vocabulary begins, and what is behind each token.

    Offsets and sizes are in bytes.
    """

    library_type: str
    names: tuple[str, ...]
    tokens_offset: int
    score_size: int = 0
    kv_value_size: int = 2


_GPT = ("vocab_size", "context_length", "width", "num_heads", "num_layers")
_MPT = ("width", "context_length", "num_heads", "num_layers", "vocab_size")
_LAYOUTS = {
    "gpt2": _Layout("gpt2", _GPT, tokens_offset=32, kv_value_size=4),
    "gptj": _Layout("gptj", _GPT, tokens_offset=36),
    "gpt_neox": _Layout("gpt_neox", _GPT, tokens_offset=36),
    "mpt": _Layout("mpt", _MPT, tokens_offset=36),
    "starcoder": _Layout("starcoder", _GPT, tokens_offset=32, kv_value_size=4),
    "dolly": _Layout("dolly-v2", _GPT, tokens_offset=36),
    "replit": _Layout("replit", _MPT, tokens_offset=28, score_size=4),
}


class _NoGGML(Exception):
    """Another format."""


class _Malformed(Exception):
    """A length that cannot be; what is wrong with the file cannot be told from a wrong type."""


def _read(file: BinaryIO, layout: _Layout) -> GGMLFile:
    size = os.fstat(file.fileno()).st_size
    if file.read(len(_MAGIC)) != _MAGIC:
        raise _NoGGML
    model = dict(zip(layout.names, _unpack(file, "<5i"), strict=True))
    if min(model.values()) < 1:
        raise _Malformed
    file.seek(layout.tokens_offset)
    for _ in range(model["vocab_size"]):
        _skip(file, _unpack(file, "<I")[0] + layout.score_size, size)
    while file.tell() < size:
        _skip_tensor(file, size)
    kv_bytes_per_token = 2 * model["num_layers"] * model["width"] * layout.kv_value_size
    return GGMLFile(layout.library_type, model["context_length"], size, kv_bytes_per_token)


def _skip_tensor(file: BinaryIO, size: int) -> None:
    num_dimensions, name_size, type_id = _unpack(file, "<3i")
    tensor_type = TENSOR_TYPES.get(type_id)
    if tensor_type is None or num_dimensions not in (1, 2):
        raise _Malformed
    num_values = math.prod(_unpack(file, f"<{num_dimensions}i"))
    _skip(file, name_size + num_values // tensor_type.block_size * tensor_type.block_bytes, size)


def _skip(file: BinaryIO, num_bytes: int, size: int) -> None:
    if not 0 <= num_bytes <= size - file.tell():
        raise _Malformed
    file.seek(num_bytes, os.SEEK_CUR)


def _unpack(file: BinaryIO, form: str) -> tuple[int, ...]:
    """Raises struct.error at the end of the file."""
    return struct.unpack(form, file.read(struct.calcsize(form)))
