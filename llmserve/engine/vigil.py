"""Whether a process hangs, told by the time that it could have used: a machine without a core to spare blames nobody.

Signs of life come in, a verdict goes out. Knows nothing of what the process does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SILENCE = 0.6
"""Seconds without a sign of life after which a process hangs. Only those count in which none of its threads waited for a core or a disk."""

LONG_SILENCE = 10.0
"""The same while it has said that it may be silent, and where the system does not tell who waits for a core."""

_SUSPICIOUS = 0.25  # seconds of silence from which on it is looked at
_LONGEST_LOOK = 0.2  # seconds that count between two looks at most: the rest was the watcher's own wait for a core
_STOPPED_LOOKS = 2  # in a row


@dataclass(frozen=True, slots=True)
class Waits:
    """How long each thread of a process has waited for a core, and all virtual cores for a real one: seconds, since some moment.
    `disk`: whether one of them waits for a disk now, as when memory is short.
    """

    threads: dict[int, float]
    stolen: float
    disk: bool = False

    def since(self, before: Waits) -> float:
        """The longest wait of one of them since then, at most."""
        if self.disk:
            return float("inf")
        longest = max((seconds - before.threads.get(thread, 0.0) for thread, seconds in self.threads.items()), default=0.0)
        return longest + self.stolen - before.stolen


class Vigil:
    """Looks at a process now and then. Not thread-safe."""

    def __init__(
        self,
        read_waits: Callable[[int], Waits | None] | None = None,
        is_stopped: Callable[[int], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read_waits = read_waits or _read_waits
        self._is_stopped = is_stopped or _is_stopped
        self._clock = clock
        self._limit = float("inf")
        self._num_stopped = 0
        self._last_look = clock()
        self.note_life()

    def expect(self, silence: float) -> None:
        """From now on it may be silent for so many seconds. Until this is called it may for ever: imports hold the GIL for long."""
        self._limit = silence
        self.note_life()

    def note_life(self) -> None:
        self._silent = 0.0
        self._waits: Waits | None = None

    def look(self, pid: int) -> str:
        """How it hangs, "" if it does not. Call it when everything that the process has sent has been noted."""
        self._num_stopped = self._num_stopped + 1 if self._is_stopped(pid) else 0
        if self._num_stopped >= _STOPPED_LOOKS:
            return "its process was stopped"
        now = self._clock()
        passed, self._last_look = min(now - self._last_look, _LONGEST_LOOK), now
        if self._silent >= _SUSPICIOUS:
            passed = self._usable(pid, passed)
        self._silent += passed
        if self._silent >= _SUSPICIOUS and self._waits is None:
            self._waits = self._read_waits(pid)
        return "its process does not answer" if self._silent >= self._patience else ""

    def _usable(self, pid: int, passed: float) -> float:
        """What of the time since the last look it could have used."""
        before, self._waits = self._waits, self._read_waits(pid)
        if before is None or self._waits is None:
            return passed
        return max(0.0, passed - self._waits.since(before))

    @property
    def _patience(self) -> float:
        return max(self._limit, LONG_SILENCE if self._waits is None else 0.0)


def _read_waits(pid: int) -> Waits | None:
    """From the scheduler's statistics (Linux's Documentation/scheduler/sched-stats.rst, proc(5)). None where there are none."""
    threads, disk = {}, False
    try:
        for folder in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):  # it has ended
                threads[int(folder.name)] = int((folder / "schedstat").read_bytes().split()[1]) / 1e9
                disk |= (folder / "stat").read_bytes().rpartition(b")")[2].split()[0] == b"D"
        stolen = int(Path("/proc/stat").read_bytes().split(b"\n", 1)[0].split()[8])
    except (OSError, ValueError, IndexError):
        return None
    return None if not threads else Waits(threads, stolen / os.sysconf("SC_CLK_TCK"), disk)


def _is_stopped(pid: int) -> bool:
    """By a signal (waitid(2)). Where the system does not tell, silence has to."""
    try:
        return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    except (AttributeError, OSError):
        return False
