"""Put a file into the cache folder whole or not at all, one maker at a time; and tell files apart without reading them.

What is made of a model's file lies there beside what was made of others, and goes when the file has changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llmserve.errors import ModelFileError

log = logging.getLogger(__name__)

_PREFIX = ".partial-"


@contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """An empty folder inside `folder` to make files in, and the lock of `folder`, until the block ends however it ends.

    All threads and processes that want a workspace there take turns. What a killed process has left goes with the next turn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        _acquire(lock.fileno(), folder)
        for left in folder.glob(f"{_PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
        work = folder / f"{_PREFIX}{os.getpid()}"
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def publish(file: Path, target: Path) -> None:
    """Move a finished file from the workspace of `target`'s folder to `target`: on the disk first, then visible, in one step."""
    _sync(file)
    os.replace(file, target)
    _sync(target.parent)


def derived(source: Path, folder: Path, recipe: tuple[object, ...], make: Callable[[Path], None]) -> Path:
    """The file in `folder` that was made of `source` by `recipe`: `make` makes it at a path it is given, once.

    Threads and processes may want the same file at once: one makes it, the others wait. What was made of earlier states of
    `source`, or by other recipes, is removed. Raises OSError, and ModelFileError when `source` changes meanwhile.
    """
    state = identity(source)
    folder = folder / fingerprint(os.fsencode(source.resolve()))
    target = folder / fingerprint(state, *recipe) / source.name
    if target.is_file():
        return target
    with workspace(folder) as work:
        if target.is_file():  # another was faster
            return target
        made = work / source.name
        make(made)
        if identity(source) != state:
            raise ModelFileError(f"{source.name} was changed while it was read.")
        for stale in folder.iterdir():
            if stale.is_dir() and stale != work:
                shutil.rmtree(stale)
        target.parent.mkdir()
        publish(made, target)
    return target


def identity(path: Path) -> str:
    """16 hexadecimal digits that change whenever the file does: of its real path, its size and its time of change.

    Raises OSError.
    """
    real = path.resolve(strict=True)
    status = real.stat()
    return fingerprint(os.fsencode(real), status.st_size, status.st_mtime_ns)


def fingerprint(*facts: object) -> str:
    """16 hexadecimal digits made of `facts`."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _acquire(lock: int, folder: Path) -> None:
    """Held until `lock` is closed, which the end of the process sees to at the latest."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("waiting for whoever writes to %s", folder)
        fcntl.flock(lock, fcntl.LOCK_EX)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
