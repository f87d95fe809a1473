"""What kernels.c became when llmserve was installed, where it did compile and this processor can do what it needs."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging

import numpy as np
from numpy.typing import NDArray

from llmserve.engine.backend import Logits

log = logging.getLogger(__name__)


@functools.cache
def library() -> ctypes.PyDLL | None:
    """Its calls from Python keep the GIL: they take microseconds."""
    try:
        spec = importlib.util.find_spec("llmserve.engine._kernels")
        if spec is None or spec.origin is None:
            raise OSError("kernels.c was not compiled")
        found = ctypes.PyDLL(spec.origin)
        found.llmserve_can.restype = ctypes.c_bool
        found.llmserve_select.restype = ctypes.c_int64
        found.llmserve_select.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_int64]
        return found if found.llmserve_can() else None
    except (OSError, AttributeError) as error:
        log.info("no kernels of our own: %s", error)
        return None


def select(scores: Logits, least: np.float32, most: int) -> NDArray[np.int64]:
    """The places of all scores from `least` on, ascending; of the first `most` if those are more. NaN is none."""
    kernels = library()
    if kernels is None or not scores.flags.c_contiguous:
        return np.flatnonzero(scores >= least)[:most]
    places = np.empty(most, np.int64)
    return places[: kernels.llmserve_select(scores.ctypes.data, len(scores), least, places.ctypes.data, most)]
