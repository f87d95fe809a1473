"""matmul.c, called as ggml calls it, against products in float64."""

import ctypes
import importlib.util

import gguf
import numpy as np
import pytest

F32, Q4_1, Q8_0, Q8_1 = 0, 3, 8, 9
SIZE = 32

spec = importlib.util.find_spec("llmserve.engine._matmul")
kernels = spec and spec.origin and ctypes.CDLL(spec.origin)
pytestmark = pytest.mark.skipif(
    not kernels or not ctypes.CFUNCTYPE(ctypes.c_bool)(("llmserve_can", kernels))(), reason="needs AVX-512 VNNI and a compiler"
)


class Params(ctypes.Structure):
    _fields_ = (("thread", ctypes.c_int), ("num_threads", ctypes.c_int))


PRODUCT = ctypes.CFUNCTYPE(
    ctypes.c_bool,
    ctypes.POINTER(Params),
    *(ctypes.c_int64,) * 3,
    *(ctypes.c_void_p, ctypes.c_int64) * 3,
    *(ctypes.c_int,) * 3,
)


def columns_for(type_a, numbers):
    """Columns in the type that ggml makes for rows of one, as bytes; what each block is scaled with, adds up to, and has."""
    blocks = numbers.reshape(len(numbers), -1, SIZE)
    scales = np.abs(blocks).max(axis=2, keepdims=True) / 127
    values = np.round(blocks / scales).astype(np.int8)
    halves = [scales.astype(np.float16)]
    if type_a == Q4_1:
        halves.append((scales * values.sum(axis=2, keepdims=True)).astype(np.float16))
    data = np.concatenate([*(half.view(np.uint8) for half in halves), values.view(np.uint8)], axis=2)
    return data, halves[0] * values.astype(np.float64), halves[-1].astype(np.float64)[:, :, 0]


def rows_in(type_a, numbers):
    """Rows as bytes; their numbers, block by block, without what is added to all of a block; that."""
    kind = gguf.GGMLQuantizationType(type_a)
    data = gguf.quantize(numbers.astype(np.float32), kind)
    blocks = gguf.dequantize(data, kind).astype(np.float64).reshape(len(numbers), -1, SIZE)
    least = np.zeros(blocks.shape[:2])
    if type_a == Q4_1:
        least = data.reshape(*least.shape, -1)[:, :, 2:4].copy().view(np.float16)[:, :, 0].astype(np.float64)
    return data, blocks - least[:, :, None], least


def exact_product(type_a, a, b):
    """In float64, and the sum of its parts' sizes."""
    (_, rows, least), (_, columns, sums) = a, b
    product = np.einsum("nki,mki->nm", columns, rows)
    size = np.einsum("nki,mki->nm", abs(columns), abs(rows))
    return (product + sums @ least.T, size + abs(sums) @ abs(least).T) if type_a == Q4_1 else (product, size)


def product(type_a, a, b, shape, num_threads=1, gap=0):
    """Of blocks as bytes: (columns, rows) of floats, which are NaN where nothing was written."""
    m, n, k = shape
    c = np.full((n, m + gap), np.nan, dtype=np.float32)
    for thread in range(num_threads):
        done = PRODUCT(("llmserve_product", kernels))(
            Params(thread, num_threads), m, n, k, a.ctypes.data, k, b.ctypes.data, k, c.ctypes.data, m + gap,
            type_a, Q8_0 if type_a == Q8_0 else Q8_1, F32,
        )  # fmt: skip
        assert done
    return c


@pytest.mark.parametrize("num_blocks", [1, 2, 7, 18, 48])
@pytest.mark.parametrize("num_rows", [1, 7, 8, 20, 64])
@pytest.mark.parametrize("type_a", [Q8_0, Q4_1])
def test_products_are_right_and_the_same_for_every_number_of_columns(type_a, num_rows, num_blocks):
    rng = np.random.default_rng(num_rows)
    a = rows_in(type_a, rng.normal(0.1, 1, (num_rows, num_blocks * SIZE)))
    b = columns_for(type_a, rng.normal(0.1, 1, (150, num_blocks * SIZE)))
    exact, size = exact_product(type_a, a, b)
    a, b = a[0], b[0]
    alone = np.concatenate(
        [product(type_a, a, b[column : column + 1].copy(), (num_rows, 1, num_blocks)) for column in range(150)]
    )
    assert (abs(alone - exact) <= 1e-6 * size).all()
    for num_columns in (2, 3, 4, 5, 6, 8, 9, 13, 16, 17, 24, 25, 40, 63, 64, 65, 150):
        for num_threads in (1, 2, 3):
            together = product(type_a, a, b[:num_columns].copy(), (num_rows, num_columns, num_blocks), num_threads, gap=3)
            assert np.array_equal(together[:, :num_rows], alone[:num_columns])
            assert np.isnan(together[:, num_rows:]).all()


@pytest.mark.parametrize("type_a", [Q8_0, Q4_1])
def test_the_largest_numbers_of_a_type_are_multiplied_exactly(type_a):
    """Sums of products of bytes at both ends of their range, which instructions of 16 bits would cut."""
    for row, column in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        a = rows_in(type_a, np.full((8, 4 * SIZE), row * 3.0) + (np.arange(4 * SIZE) % 2) * (type_a == Q4_1))
        for num_columns in (1, 8, 16):
            b = columns_for(type_a, np.full((num_columns, 4 * SIZE), column * 5.0))
            exact, size = exact_product(type_a, a, b)
            assert (abs(product(type_a, a[0], b[0], (8, num_columns, 4)) - exact) <= 1e-6 * size).all()


def call(type_a=Q8_0, type_b=Q8_0, type_c=F32, num_blocks=1):
    nothing = ctypes.c_void_p()
    return PRODUCT(("llmserve_product", kernels))(
        Params(0, 1), 1, 1, num_blocks, nothing, num_blocks, nothing, num_blocks, nothing, 1, type_a, type_b, type_c
    )


@pytest.mark.parametrize(
    "types",
    [{"type_a": 1}, {"type_a": 2}, {"type_b": F32}, {"type_a": Q4_1}, {"type_c": 1}, {"num_blocks": 2**15}],
    ids=str,
)
def test_other_products_are_left_to_others(types):
    """Nothing is read or written: there is nothing."""
    assert not call(**types)
