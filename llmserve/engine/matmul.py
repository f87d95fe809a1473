"""How ggml multiplies matrices, where it leaves no choice and its way costs a model on few cores dearly.

Two functions of ggml decide. `ggml_is_numa`: whether each thread has one even share of the rows, or takes 64 at a time as it comes,
and begins anew to fetch from memory each time. `llamafile_sgemm`: multiplies several tokens by tiles of four rows, or declines,
and they are multiplied row by row; few tokens wait for memory in tiles. ggml calls both through a table of addresses, which the
dynamic linker fills in so that other libraries can put theirs there (ELF, "Global Offset Table"). Here the addresses of functions
that say yes or no are put there; and in place of the second our own (kernels.c), where a processor can do what it needs: it multiplies
matrices in Q8_0 and Q4_1, and lets the library's do the others, or nobody. How rows are shared changes no score; tiles change none with
some types of weights; our own has scores of its own, by rounding, which are the same to the last bit for any number of tokens.

The table is the process's, and a pass in which it changed would be wrong. So it is touched only in processes whose passes are all
counted here (`MatMul.claim`), and only while there is none.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import mmap
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llmserve.engine import kernels

log = logging.getLogger(__name__)

OURS = frozenset({"Q4_1", "Q8_0"})
"""Types of weights that there are kernels of ours for."""

_MOST_THREADS = 4
"""That have even shares. With more, one is likelier to be late, and then all wait for it; that was not measured."""
_SHARED = 1.0  # seconds for which a process whose passes overlapped has tiles
_PATIENCE = 10.0  # seconds to wait for the end of others' passes; one that never ends must keep nobody else

_YES, _NO = "ggml_cpu_has_avx2", "ggml_cpu_has_neon"
"""Functions of ggml that say so where this was measured. The arguments of those that they stand for are no matter to them."""
_REPLACED = {"ggml_is_numa": _YES, "llamafile_sgemm": _NO, "pthread_setaffinity_np": _NO}

_PROT_READ_WRITE = 3  # of sys/mman.h
_ADDRESSES = (6, 7)  # R_X86_64_GLOB_DAT and R_X86_64_JUMP_SLOT of elf.h: relocations that are a function's address


class MatMul:
    """The ways of this process's ggml. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._claimed = False
        self._table: dict[str, _Entry] | None = None  # by name; empty where it must not be touched
        self._num_passes = 0  # under way
        self._without_tiles = False  # are they
        self._shared_until = 0.0
        self._num_waiting = 0  # models that will be read as soon as there is no pass
        self._num_loading = 0

    def claim(self) -> None:
        """Say that nothing in this process runs passes of ggml but what counts them here. Before the first of them."""
        self._claimed = True

    def will_have_kernels(self, *, claimed: bool = False) -> bool:
        """Whether weights of `OURS` will be multiplied by them, as far as can be told before the library is loaded.

        `claimed`: in a process that is going to be.
        """
        can_be_put_in = _is_supported() and importlib.util.find_spec("elftools") is not None
        return (claimed or self._claimed) and can_be_put_in and kernels.library() is not None

    def choose(self, function: Any) -> None:
        """Have a choice from now on, if that can be had, in the library that has this function."""
        with self._changed:
            if self._claimed and self._table is None and self._wait_for_quiet() and self._table is None:
                self._table = _find_table(function)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """While a file is opened: whoever opens it asks `ggml_is_numa` as well, and would have it read page by page."""
        with self._changed:
            if self._table and self._wait_for_quiet():
                self._table["ggml_is_numa"].set(False)
            self._num_loading += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_loading -= 1

    @contextmanager
    def passing(self, threads: int, *, tiles: bool) -> Iterator[None]:
        """While a pass is made, by so many threads; with tiles, or without if that can be had.

        Passes of several models that overlap have tiles, all of them: one may be of those whose scores depend on it.
        """
        with self._changed:
            if self._num_passes:
                self._shared_until = self._clock() + _SHARED
            self._changed.wait_for(lambda: not (self._num_waiting or (self._num_passes and self._without_tiles)), _PATIENCE)
            if self._table and not self._num_passes:
                self._without_tiles = not tiles and self._clock() >= self._shared_until
                self._table["llamafile_sgemm"].set(self._without_tiles)
                self._table["ggml_is_numa"].set(threads <= _MOST_THREADS and not self._num_loading)
            self._num_passes += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_passes -= 1
                self._changed.notify_all()

    def _wait_for_quiet(self) -> bool:
        """Until no pass is under way; those that come stand back. Whether there is none. Caller holds the lock."""
        self._num_waiting += 1
        quiet = self._changed.wait_for(lambda: not self._num_passes, _PATIENCE)
        self._num_waiting -= 1
        self._changed.notify_all()
        return quiet


process = MatMul()


class _Entry:
    """An address in the table of a library, and another function's to put in its place."""

    def __init__(self, place: int, other: int) -> None:
        self._value = ctypes.c_void_p.from_address(place)
        self._own, self._other = self._value.value, other

    def set(self, other: bool) -> None:
        self._value.value = self._other if other else self._own


def _is_supported() -> bool:
    return sys.platform == "linux" and platform.machine() == "x86_64"


def _find_table(function: Any) -> dict[str, _Entry]:
    """What may be changed; nothing where anything is not as it was when this was measured."""
    if not _is_supported():
        return {}
    try:
        return _open_table(function)
    except Exception as error:  # whatever it is, the library does without
        log.info("llama.cpp multiplies as it is used to: %s", error)
        return {}


def _open_table(function: Any) -> dict[str, _Entry]:
    """The entries, which can be written from now on. Raises where one is not what it should be."""
    llama = ctypes.CDLL(os.fsdecode(_library_of(_address(function)).dli_fname), os.RTLD_NOLOAD)
    # dlsym(3) looks into what a library needs as well.
    functions = {name: getattr(llama, name) for name in (*_REPLACED, _YES, _NO)}
    ggml = _library_of(_address(functions["ggml_is_numa"]))
    places = {name: ggml.dli_fbase + place for name, place in _places(os.fsdecode(ggml.dli_fname)).items()}
    if functions[_YES]() != 1 or functions[_NO]() != 0:
        raise OSError(f"no {_YES}")
    if any(ctypes.c_void_p.from_address(places[name]).value != _address(functions[name]) for name in _REPLACED):
        raise OSError("its table has other addresses")
    for place in places.values():
        _make_writable(place)
    table = {name: _Entry(places[name], _address(functions[other])) for name, other in _REPLACED.items()}
    if (ours := kernels.library()) is not None:
        others = ctypes.c_void_p.in_dll(ours, "llmserve_others")
        others.value = _address(functions["llamafile_sgemm"])
        _Entry(places["llamafile_sgemm"], _address(ours.llmserve_product)).set(True)
        table["llamafile_sgemm"] = _Entry(ctypes.addressof(others), 0)
        log.info("weights in Q8_0 and Q4_1 are multiplied by kernels of llmserve's own")
    # Behind each pass ggml gives a thread back to all nodes, if it thinks that there are several, and they were never counted.
    table.pop("pthread_setaffinity_np").set(True)
    return table


def _places(path: str) -> dict[str, int]:
    """Where in a library that is loaded, from its base on, the addresses stand that its own calls go to."""
    from elftools.elf.elffile import ELFFile
    from elftools.elf.relocation import RelocationSection
    from elftools.elf.sections import SymbolTableSection

    found: dict[str, int] = {}
    with open(path, "rb") as file:
        elf = ELFFile(file)
        for section in elf.iter_sections():
            symbols = elf.get_section(section["sh_link"])
            if isinstance(section, RelocationSection) and isinstance(symbols, SymbolTableSection):
                for relocation in section.iter_relocations():
                    if relocation["r_info_type"] in _ADDRESSES:
                        name = symbols.get_symbol(relocation["r_info_sym"]).name
                        if name in found:
                            raise OSError(f"{name} stands in the table twice")
                        if name in _REPLACED:
                            found[name] = relocation["r_offset"]
    return found


class _DlInfo(ctypes.Structure):
    """Of dlfcn.h."""

    _fields_ = (
        ("dli_fname", ctypes.c_char_p),
        ("dli_fbase", ctypes.c_void_p),
        ("dli_sname", ctypes.c_char_p),
        ("dli_saddr", ctypes.c_void_p),
    )


def _library_of(address: int) -> _DlInfo:
    info = _DlInfo()
    if not ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(info)):
        raise OSError("dladdr finds nothing")
    return info


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _make_writable(address: int) -> None:
    """The linker has made the table's page read-only once it was full."""
    libc = ctypes.CDLL(None, use_errno=True)
    page = address - address % mmap.PAGESIZE
    if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), _PROT_READ_WRITE):
        raise OSError(ctypes.get_errno(), "mprotect")
