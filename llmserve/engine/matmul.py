"""Which of its ways to multiply matrices ggml takes, where it leaves no choice from outside and the wrong one costs a third.

At each multiplication ggml asks two functions of its own. `ggml_is_numa`: whether each thread has one even share of the rows, or
takes 64 of them at a time as it comes, and begins anew to fetch from memory each time. `llamafile_sgemm`: multiplies several tokens
by tiles of four rows, or declines; few tokens wait for memory in tiles. A caller finds these functions in a table of addresses,
which the dynamic linker fills in so that other libraries can put theirs there (ELF, "Global Offset Table"): here the addresses of
functions that say yes or no are put there. What is computed stays the same to the last bit.

The table is the process's, and a pass in which it changed would be wrong. So it is touched only in processes whose passes are all
counted here (`claim`), and only while there is none.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import platform
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)

_MOST_THREADS = 4
"""With more, one is likelier to be late, and then all wait for its share; that was not measured."""

_YES, _NO = "ggml_cpu_has_sse3", "ggml_cpu_has_neon"
"""Functions of ggml that say so, of x86 processors. The caller's arguments are no matter to them."""

_PROT_READ_WRITE = 3  # of sys/mman.h


class _Dl_info(ctypes.Structure):
    _fields_ = (
        ("dli_fname", ctypes.c_char_p),
        ("dli_fbase", ctypes.c_void_p),
        ("dli_sname", ctypes.c_char_p),
        ("dli_saddr", ctypes.c_void_p),
    )


class MatMul:
    """The ways of this process's ggml. Thread-safe."""

    def __init__(self) -> None:
        self._idle = threading.Condition()
        self._claimed = False
        self._entries: dict[str, _Entry] | None = None  # in the table, by name; none where it cannot be changed
        self._num_rounded = 0  # contexts that come to other scores by tiles
        self._num_passes = 0  # under way

    def claim(self) -> None:
        """Say that nothing in this process runs passes of ggml but what counts them here. Before the first of them."""
        self._claimed = True

    def open(self, function: Any | None, *, exact_tiles: bool) -> None:
        """A context comes, of the library that has this function; without one, nothing is chosen that is not chosen yet.

        While one of them is not exact with tiles, all passes have them: its scores must not depend on what others do meanwhile.
        """
        with self._idle:
            self._idle.wait_for(lambda: not self._num_passes)
            self._num_rounded += not exact_tiles
            if self._claimed and self._entries is None and function is not None:
                self._entries = _find_entries(function)

    def close(self, *, exact_tiles: bool) -> None:
        """A context goes."""
        with self._idle:
            self._num_rounded -= not exact_tiles

    @contextmanager
    def passing(self, threads: int, *, tiles: bool) -> Iterator[None]:
        """While a pass is made, by so many threads; with tiles, or without if that can be had."""
        with self._idle:
            if self._entries and not self._num_passes:
                self._entries["ggml_is_numa"].set(threads <= _MOST_THREADS)
                self._entries["llamafile_sgemm"].set(not tiles and not self._num_rounded)
            self._num_passes += 1
        try:
            yield
        finally:
            with self._idle:
                self._num_passes -= 1
                if not self._num_passes:
                    self._idle.notify_all()


process = MatMul()


class _Entry:
    """An address in the table of a library, and another function's to put in its place."""

    def __init__(self, address: int, other: int) -> None:
        self._value = ctypes.c_void_p.from_address(address)
        self._own, self._other = self._value.value, other

    def set(self, other: bool) -> None:
        self._value.value = self._other if other else self._own


def _find_entries(function: Any) -> dict[str, _Entry]:
    """What may be changed; nothing where anything is not as it was when this was measured."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return {}
    try:
        llama = ctypes.CDLL(os.fsdecode(_whose(_address(function)).dli_fname), os.RTLD_NOLOAD)
        yes, no = getattr(llama, _YES), getattr(llama, _NO)  # dlsym(3) looks into what a library needs as well
        own = {name: _address(getattr(llama, name)) for name in ("ggml_is_numa", "llamafile_sgemm")}
        ggml = _whose(own["ggml_is_numa"])
        places = _places(os.fsdecode(ggml.dli_fname), {*own, "pthread_setaffinity_np"})
        if (
            yes() != 1
            or no() != 0
            or any(ctypes.c_void_p.from_address(ggml.dli_fbase + places[name]).value != own[name] for name in own)
        ):
            return {}
        others = {"ggml_is_numa": _address(yes), "llamafile_sgemm": _address(no), "pthread_setaffinity_np": _address(no)}
        for name in others:
            _make_writable(ggml.dli_fbase + places[name])
    except (AttributeError, KeyError, OSError, ImportError) as error:
        log.info("llama.cpp multiplies as it is used to: %r", error)
        return {}
    entries = {name: _Entry(ggml.dli_fbase + places[name], others[name]) for name in others}
    entries["pthread_setaffinity_np"].set(
        True
    )  # on a NUMA machine ggml would now bind threads to nodes that it has not looked for
    return entries


def _places(path: str, names: set[str]) -> dict[str, int]:
    """Where in a library that is loaded, from its base on, the addresses of these functions stand for its own calls."""
    from elftools.elf.elffile import ELFFile
    from elftools.elf.relocation import RelocationSection
    from elftools.elf.sections import SymbolTableSection

    found = {}
    with open(path, "rb") as file:
        elf = ELFFile(file)
        for section in elf.iter_sections():
            symbols = elf.get_section(section["sh_link"])
            if isinstance(section, RelocationSection) and isinstance(symbols, SymbolTableSection):
                for relocation in section.iter_relocations():
                    name = symbols.get_symbol(relocation["r_info_sym"]).name if relocation["r_info_sym"] else ""
                    if name in names:
                        found[name] = relocation["r_offset"]
    return found


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _whose(address: int) -> _Dl_info:
    """The library that an address lies in. Raises OSError where there is none."""
    info = _Dl_info()
    if not ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(info)):
        raise OSError("dladdr finds nothing")
    return info


def _make_writable(address: int) -> None:
    """The linker has made the table read-only once it was full."""
    libc = ctypes.CDLL(None, use_errno=True)
    page = address - address % mmap.PAGESIZE
    if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), _PROT_READ_WRITE):
        raise OSError(ctypes.get_errno(), "mprotect")
