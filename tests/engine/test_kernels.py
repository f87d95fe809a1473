"""kernels.c: products, called as ggml calls it, against float64; and the best of many scores."""

import ctypes
import importlib.machinery
import mmap

import gguf
import numpy as np
import pytest

from llmserve.engine import kernels

F32, Q4_1, Q8_0, Q8_1 = 0, 3, 8, 9
SIZE = 32

needs_kernels = pytest.mark.skipif(kernels.library() is None, reason="needs Linux, AVX-512 VNNI and a compiler")


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


@pytest.fixture(scope="module")
def at_the_end():
    """Puts bytes right before a page that cannot be read or written; they can be looked at through the array that it returns."""
    libc, kept = ctypes.CDLL(None, use_errno=True), []

    def put(data):
        size = data.nbytes + -data.nbytes % mmap.PAGESIZE
        pages = mmap.mmap(-1, size + mmap.PAGESIZE)
        kept.append(pages)
        whole = np.frombuffer(pages, np.uint8)
        failed = libc.mprotect(ctypes.c_void_p(whole.ctypes.data + size), ctypes.c_size_t(mmap.PAGESIZE), 0)
        assert not failed
        placed = whole[size - data.nbytes : size]
        placed[:] = data.reshape(-1).view(np.uint8)
        return placed

    return put


def multiply(type_a, a, b, c, shape, ld, thread=0, num_threads=1, room=(0, 0)):
    m, n, k = shape
    types = (type_a, Q8_0 if type_a == Q8_0 else Q8_1, F32)
    addresses = (each.ctypes.data for each in (a, b, c))
    places = (part for pair in zip(addresses, (k + room[0], k + room[1], ld), strict=True) for part in pair)
    assert PRODUCT(("llmserve_product", kernels.library()))(Params(thread, num_threads), m, n, k, *places, *types)


def product(type_a, a, b, shape, num_threads=1, gap=0):
    """Of blocks as bytes: (columns, rows) of floats, which are NaN where nothing was written."""
    m, n, _ = shape
    c = np.full((n, m + gap), np.nan, dtype=np.float32)
    for thread in range(num_threads):
        multiply(type_a, a, b, c, shape, m + gap, thread, num_threads)
    return c


@needs_kernels
@pytest.mark.parametrize("num_blocks", [1, 2, 7, 18, 100])
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


@needs_kernels
@pytest.mark.parametrize("num_columns", [1, 8, 16])
@pytest.mark.parametrize("type_a", [Q8_0, Q4_1])
def test_the_largest_numbers_of_a_type_are_multiplied_exactly(type_a, num_columns):
    """Bytes at both ends of their range, whose products' sums do not fit into 16 bits."""
    one = np.array([1, 0], np.float16).view(np.uint8)
    for column in (-128, 127):
        for row, number in ((0x80, -128), (0x7F, 127)) if type_a == Q8_0 else ((0x00, 0), (0xFF, 15)):
            a = np.concatenate(
                [one[: 2 if type_a == Q8_0 else 4], np.full(SIZE if type_a == Q8_0 else SIZE // 2, row, np.uint8)]
            )
            b = np.concatenate([one[: 2 if type_a == Q8_0 else 4], np.full(SIZE, column).astype(np.int8).view(np.uint8)])
            made = product(type_a, np.tile(a, (20, 3, 1)), np.tile(b, (num_columns, 3, 1)), (20, num_columns, 3))
            assert (made == 3 * SIZE * number * column).all()


@needs_kernels
@pytest.mark.parametrize("type_a", [Q8_0, Q4_1])
def test_rows_and_columns_may_have_room_between_them(type_a):
    rng = np.random.default_rng(0)
    a = rows_in(type_a, rng.normal(0, 1, (20, 9 * SIZE)))[0].reshape(20, 9, -1)
    b = columns_for(type_a, rng.normal(0, 1, (12, 7 * SIZE)))[0]
    for num_columns in (3, 12):
        c = np.zeros((num_columns, 20), np.float32)
        multiply(type_a, a, b, c, (20, num_columns, 5), 20, room=(4, 2))
        assert np.array_equal(c, product(type_a, a[:, :5].copy(), b[:num_columns, :5].copy(), (20, num_columns, 5)))


@needs_kernels
@pytest.mark.parametrize("num_columns", [1, 3, 8, 9, 17])
@pytest.mark.parametrize("num_rows", [1, 16, 17, 40])
@pytest.mark.parametrize("type_a", [Q8_0, Q4_1])
def test_nothing_is_read_or_written_behind_the_ends(at_the_end, type_a, num_rows, num_columns):
    rng = np.random.default_rng(0)
    a = rows_in(type_a, rng.normal(0, 1, (num_rows, 3 * SIZE)))[0]
    b = columns_for(type_a, rng.normal(0, 1, (num_columns, 3 * SIZE)))[0]
    c = at_the_end(np.zeros((num_columns, num_rows), np.float32)).view(np.float32)
    multiply(type_a, at_the_end(a), at_the_end(b), c, (num_rows, num_columns, 3), num_rows)
    assert np.array_equal(c.reshape(num_columns, num_rows), product(type_a, a, b, (num_rows, num_columns, 3)))


def call(type_a=Q8_0, type_b=Q8_0, type_c=F32, num_blocks=1):
    nothing = ctypes.c_void_p()
    return PRODUCT(("llmserve_product", kernels.library()))(
        Params(0, 1), 1, 1, num_blocks, nothing, num_blocks, nothing, num_blocks, nothing, 1, type_a, type_b, type_c
    )


@needs_kernels
@pytest.mark.parametrize(
    "types",
    [{"type_a": 1}, {"type_a": 2}, {"type_b": F32}, {"type_a": Q4_1}, {"type_c": 1}, {"num_blocks": 2**15}],
    ids=str,
)
def test_other_products_are_left_to_others(types):
    """Nothing is read or written: there is nothing."""
    assert not call(**types)


@pytest.mark.parametrize("ours", [pytest.param(True, marks=needs_kernels), False])
@pytest.mark.parametrize("length", [1, 15, 16, 63, 64, 65, 1000])
def test_all_scores_from_one_on_are_selected(at_the_end, monkeypatch, length, ours):
    if not ours:
        monkeypatch.setattr(kernels, "library", lambda: None)
    scores = at_the_end(np.random.default_rng(length).integers(0, 50, length).astype(np.float32)).view(np.float32)
    scores[::7] = np.nan
    scores[3::11] = -np.inf
    for least in (0, 25, 49, 50):
        places = np.flatnonzero(scores >= least)
        for most in (1, 5, length):
            assert np.array_equal(kernels.select(scores, np.float32(least), most), places[:most])


def test_scores_with_room_between_them_are_selected_too():
    scores = np.arange(100, dtype=np.float32)[::2]
    assert kernels.select(scores, np.float32(90), 50).tolist() == [45, 46, 47, 48, 49]


@pytest.mark.parametrize("content", [None, b"no library", b""])
def test_kernels_that_cannot_be_opened_are_done_without(tmp_path, monkeypatch, caplog, content):
    caplog.set_level("INFO")
    path = tmp_path / "_kernels.so"
    if content is not None:
        path.write_bytes(content)
    found = None if content is None else importlib.machinery.ModuleSpec("_kernels", None, origin=str(path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    assert kernels.library.__wrapped__() is None
    assert "no kernels of our own" in caplog.text
