"""Read GGUF files' headers and write them: a path in, metadata and a directory of the tensors out; and back to bytes.

Knows nothing of architectures or tokenizers, and never touches tensor data. Any bytes can be read: what is not a whole
GGUF file is a ModelFileError, in bounded time and memory. Format: docs/gguf.md of ggml.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, overload

from llmserve.errors import ModelFileError

MAX_HEADER_SIZE = 32 * 1024**2
"""Bytes. A vocabulary takes about 40 for each token with its merge. The bound keeps a malicious header from filling the memory."""

MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32
FIRST_READ_SIZE = 4 * 1024**2  # holds most headers whole

T = TypeVar("T", bool, int, float, str, tuple[Any, ...])


class Strings(Sequence[str]):
    """An array of strings as the file spells it, decoded when it is looked at. Immutable.

    Those of a vocabulary are 10^5. As objects they would take ten times the file's bytes, and what they leave between
    objects that live longer does not go back to the system.
    """

    def __init__(self, data: bytes, starts: Sequence[int], ends: Sequence[int]) -> None:
        """The string `i` is `data[starts[i]:ends[i]]`."""
        self._data = data
        self._starts = starts
        self._ends = ends

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[str]:
        data = self._data
        for start, end in zip(self._starts, self._ends, strict=True):
            yield data[start:end].decode("utf-8", "surrogateescape")

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Strings: ...
    def __getitem__(self, index: int | slice) -> str | Strings:
        if isinstance(index, slice):
            return Strings(self._data, self._starts[index], self._ends[index])
        return self._data[self._starts[index] : self._ends[index]].decode("utf-8", "surrogateescape")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)


Scalar = bool | int | float | str
Value = Scalar | tuple[Scalar, ...] | Strings


class ValueType(IntEnum):
    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_FORMATS = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "?",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}


@dataclass(frozen=True, slots=True)
class TensorType:
    """How ggml stores numbers: `block_size` of them in `block_bytes` bytes. Quantized types have blocks of more than one."""

    id: int
    name: str
    block_size: int
    block_bytes: int


_K = 256
TENSOR_TYPES: Mapping[int, TensorType] = {
    tensor_type.id: tensor_type
    for tensor_type in (
        TensorType(0, "F32", 1, 4),
        TensorType(1, "F16", 1, 2),
        TensorType(2, "Q4_0", 32, 18),
        TensorType(3, "Q4_1", 32, 20),
        TensorType(6, "Q5_0", 32, 22),
        TensorType(7, "Q5_1", 32, 24),
        TensorType(8, "Q8_0", 32, 34),
        TensorType(9, "Q8_1", 32, 40),
        TensorType(10, "Q2_K", _K, 84),
        TensorType(11, "Q3_K", _K, 110),
        TensorType(12, "Q4_K", _K, 144),
        TensorType(13, "Q5_K", _K, 176),
        TensorType(14, "Q6_K", _K, 210),
        TensorType(15, "Q8_K", _K, 292),
        TensorType(16, "IQ2_XXS", _K, 66),
        TensorType(17, "IQ2_XS", _K, 74),
        TensorType(18, "IQ3_XXS", _K, 98),
        TensorType(19, "IQ1_S", _K, 50),
        TensorType(20, "IQ4_NL", 32, 18),
        TensorType(21, "IQ3_S", _K, 110),
        TensorType(22, "IQ2_S", _K, 82),
        TensorType(23, "IQ4_XS", _K, 136),
        TensorType(24, "I8", 1, 1),
        TensorType(25, "I16", 1, 2),
        TensorType(26, "I32", 1, 4),
        TensorType(27, "I64", 1, 8),
        TensorType(28, "F64", 1, 8),
        TensorType(29, "IQ1_M", _K, 56),
        TensorType(30, "BF16", 1, 2),
        TensorType(34, "TQ1_0", _K, 54),
        TensorType(35, "TQ2_0", _K, 66),
        TensorType(39, "MXFP4", 32, 17),
        TensorType(40, "NVFP4", 64, 36),
        TensorType(41, "Q1_0", 128, 18),
    )
}
"""By id: enum ggml_type of ggml.h. Ids that are missing were never released or are withdrawn."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """`shape` is in ggml's order, the contiguous dimension first; `offset` counts from the file's `data_offset`."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """A header. Arrays are tuples, or `Strings`; text that is not UTF-8 holds surrogate escapes. Sizes and offsets are in bytes.

    `types` has the type of each value of `metadata`, and of the elements when that value is an array.
    """

    version: int
    metadata: Mapping[str, Value]
    types: Mapping[str, ValueType]
    tensors: tuple[TensorInfo, ...]
    alignment: int
    data_offset: int
    size: int

    def get(self, key: str, kind: type[T]) -> T | None:
        """The value of `key`, which must be a `kind` if it is there; None if not. Raises ModelFileError."""
        value = self.metadata.get(key)
        if value is None or type(value) is kind:
            return value
        raise ModelFileError(f"The model file's {key!r} is of the wrong type: {kind.__name__} was expected.")


class _Malformed(Exception):
    """What is wrong with the file, worded to follow its name."""


class _HeaderGoesOn(Exception):
    """The header is longer than the bytes read so far."""


def read(path: Path) -> GGUFFile:
    """The header of a GGUF file whose tensor data is all there. Raises ModelFileError. Tens of milliseconds."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
            raise _Malformed("is not a file")
        with open(path, "rb") as file:
            return _read(file)
    except OSError as error:
        raise ModelFileError(f"{path.name} cannot be read: {error.strerror}.") from error
    except _Malformed as error:
        raise ModelFileError(f"{path.name} {error!s:.200}.") from None


def pack_header(gguf: GGUFFile) -> bytes:
    """The bytes before the tensor data that `read` makes `gguf` of. Its `data_offset` and `size` are not looked at."""
    parts = [struct.pack("<4sIQQ", b"GGUF", gguf.version, len(gguf.tensors), len(gguf.metadata))]
    for key, value in gguf.metadata.items():
        parts += _pack_string(key), *_pack_value(value, gguf.types[key])
    for tensor in gguf.tensors:
        shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        parts += _pack_string(tensor.name), shape, struct.pack("<IQ", tensor.type.id, tensor.offset)
    header = b"".join(parts)
    return header.ljust(align(len(header), gguf.alignment), b"\0")


def align(position: int, alignment: int) -> int:
    """The first multiple of `alignment` that is not below `position`."""
    return (position + alignment - 1) // alignment * alignment


def _read(file: BinaryIO) -> GGUFFile:
    size = os.fstat(file.fileno()).st_size
    for limit in (FIRST_READ_SIZE, MAX_HEADER_SIZE):
        file.seek(0)
        try:
            return _parse(_Reader(file.read(limit), size))
        except _HeaderGoesOn:
            continue
    raise _Malformed(f"has a header of more than {MAX_HEADER_SIZE} bytes, which no model needs")


def _parse(reader: _Reader) -> GGUFFile:
    _check_magic(reader)
    version, num_tensors, num_keys = reader.unpack("<4xIQQ")
    if version not in (2, 3):
        raise _Malformed(f"has GGUF version {version}; versions 2 and 3 are supported")
    metadata, types = _parse_metadata(reader, num_keys)
    tensors = tuple(_parse_tensors(reader, num_tensors))
    alignment = _alignment(metadata)
    data_offset = align(reader.position, alignment)
    _check_tensors(tensors, alignment)
    end = max((data_offset + tensor.offset + tensor.num_bytes for tensor in tensors), default=0)
    if end > reader.size:
        raise _Malformed(f"is cut: its tensors end at byte {end}, but the file has {reader.size} bytes; fetch it again")
    return GGUFFile(version, metadata, types, tensors, alignment, data_offset, reader.size)


_OTHER_FORMATS: tuple[tuple[bytes | tuple[bytes, ...], str], ...] = (
    (b"PK\x03\x04", "is a ZIP archive"),
    (b"\x80", "is a Python pickle, perhaps of PyTorch"),
    ((b"lmgg", b"fmgg", b"tjgg"), "is a GGML file, from before GGUF, which needs its model_type to be configured"),
    (b"version https://git-lfs", "is a Git LFS pointer, in the place of the file it points to"),
    (b"<", "is an HTML or XML page, perhaps an error message in the place of a download"),
)


def _check_magic(reader: _Reader) -> None:
    start = reader.data[:32].lstrip()
    if not reader.size:
        raise _Malformed("is empty")
    if start.startswith(b"GGUF\0\0\0"):
        raise _Malformed("is a big-endian GGUF file; only little-endian ones are supported")
    if not reader.data.startswith(b"GGUF"):
        what = next((name for magic, name in _OTHER_FORMATS if start.startswith(magic)), f"begins with {start[:8]!r}")
        raise _Malformed(f"is not a GGUF file: it {what}")


def _parse_metadata(reader: _Reader, num_keys: int) -> tuple[dict[str, Value], dict[str, ValueType]]:
    reader.need(num_keys * struct.calcsize("<QIB"))
    metadata: dict[str, Value] = {}
    types: dict[str, ValueType] = {}
    for _ in range(num_keys):
        key = reader.string()
        if key in metadata:
            raise _Malformed(f"is damaged: its header has the key {key!r} twice")
        metadata[key], types[key] = _parse_value(reader)
    return metadata, types


def _parse_value(reader: _Reader) -> tuple[Value, ValueType]:
    value_type = _value_type(reader)
    if value_type is not ValueType.ARRAY:
        return reader.string() if value_type is ValueType.STRING else reader.values(value_type, 1)[0], value_type
    element_type = _value_type(reader)
    if element_type is ValueType.ARRAY:  # the format allows them, llama.cpp does not
        raise _Malformed("has an array of arrays in its header, which is not supported")
    (count,) = reader.unpack("<Q")
    return reader.values(element_type, count), element_type


def _value_type(reader: _Reader) -> ValueType:
    (number,) = reader.unpack("<I")
    if number > max(ValueType):
        raise _Malformed(f"is damaged: its header has a value of the unknown type {number}")
    return ValueType(number)


def _parse_tensors(reader: _Reader, num_tensors: int) -> Iterator[TensorInfo]:
    reader.need(num_tensors * struct.calcsize("<QIIQ"))
    for _ in range(num_tensors):
        name = reader.string()
        (num_dimensions,) = reader.unpack("<I")
        if num_dimensions > MAX_DIMENSIONS:
            raise _Malformed(f"is damaged: its tensor {name!r} has {num_dimensions} dimensions")
        *shape, type_id, offset = reader.unpack(f"<{num_dimensions}QIQ")
        if type_id not in TENSOR_TYPES:
            raise _Malformed(f"is damaged or too new: its tensor {name!r} is of the unknown type {type_id}")
        yield _tensor(name, tuple(shape), TENSOR_TYPES[type_id], offset)


def _tensor(name: str, shape: tuple[int, ...], tensor_type: TensorType, offset: int) -> TensorInfo:
    if shape and shape[0] % tensor_type.block_size:
        raise _Malformed(f"is damaged: the rows of its tensor {name!r} are not made of whole blocks")
    num_bytes = math.prod(shape) // tensor_type.block_size * tensor_type.block_bytes
    return TensorInfo(name, shape, tensor_type, offset, num_bytes)


def _alignment(metadata: Mapping[str, Value]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise _Malformed(f"is damaged: its alignment is {alignment!r}, not a power of two")
    return alignment


def _check_tensors(tensors: tuple[TensorInfo, ...], alignment: int) -> None:
    """Two names may share one range of the file, whole; wrong offsets would go unnoticed otherwise."""
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise _Malformed("is damaged: it has two tensors of the same name")
    ranges = sorted({(tensor.offset, tensor.offset + tensor.num_bytes) for tensor in tensors})
    if any(begin % alignment for begin, _ in ranges) or any(end > begin for (_, end), (begin, _) in pairwise(ranges)):
        raise _Malformed("is damaged: its tensors overlap or are not aligned")


class _Reader:
    """A cursor over `data`, the first bytes of a file of `size` bytes. Every step is checked against both."""

    def __init__(self, data: bytes, size: int) -> None:
        self.data = data
        self.size = size
        self.position = 0

    def need(self, num_bytes: int) -> None:
        """Raise unless `num_bytes` more are there: allocations come after this."""
        end = self.position + num_bytes
        if end > self.size:
            raise _Malformed(f"is damaged or cut: its header goes on to byte {end}, but the file has {self.size} bytes")
        if end > len(self.data):
            raise _HeaderGoesOn

    def unpack(self, form: str) -> tuple[Any, ...]:
        num_bytes = struct.calcsize(form)
        self.need(num_bytes)
        self.position += num_bytes
        return struct.unpack_from(form, self.data, self.position - num_bytes)

    def string(self) -> str:
        (length,) = self.unpack("<Q")
        self.need(length)
        self.position += length
        return self.data[self.position - length : self.position].decode("utf-8", "surrogateescape")

    def values(self, value_type: ValueType, count: int) -> tuple[Scalar, ...] | Strings:
        if value_type is ValueType.STRING:
            return self.strings(count)
        form = _FORMATS[value_type]
        self.need(count * struct.calcsize(f"<{form}"))  # first: an absurd count is no valid format
        return self.unpack(f"<{count}{form}")

    def strings(self, count: int) -> Strings:
        """A vocabulary has 10^5 of them, so nothing is checked in the loop but that each length lies within the data."""
        self.need(8 * count)
        data, begin, unpack = self.data, self.position, struct.Struct("<Q").unpack_from
        starts, ends, end = array("I"), array("I"), begin  # MAX_HEADER_SIZE is within 32 bits
        for _ in range(count):
            if end + 8 > len(data):
                break
            start = end + 8
            end = start + unpack(data, end)[0]
            starts.append(start - begin)
            ends.append(min(end, len(data)) - begin)
        self.position = end
        self.need(8 * (count - len(starts)))
        return Strings(data[begin:end], starts, ends)  # the strings' own bytes, for `data` is most of it tensors


def _pack_value(value: Value, value_type: ValueType) -> Iterator[bytes]:
    if isinstance(value, tuple | Strings):
        yield struct.pack("<IIQ", ValueType.ARRAY, value_type, len(value))
    else:
        yield struct.pack("<I", value_type)
        value = (value,)
    if value_type is ValueType.STRING:
        yield from map(_pack_string, value)  # type: ignore[arg-type]
    else:
        yield struct.pack(f"<{len(value)}{_FORMATS[value_type]}", *value)


def _pack_string(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(encoded)) + encoded
