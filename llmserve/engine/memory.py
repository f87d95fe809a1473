"""Give memory that was freed back to the system."""

from __future__ import annotations

import gc


def trim() -> None:
    """Return free pages of the C allocator. glibc keeps them by itself, in as many arenas as threads once allocated: a
    hundred megabytes and more after a model is closed, twenty after one is opened. Elsewhere nothing happens.
    """
    import ctypes  # here, for the registry imports this module before the first answer of /health

    gc.collect()  # what an engine leaves behind may refer to itself
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # malloc_trim(3)
    if malloc_trim is not None:
        malloc_trim(0)
