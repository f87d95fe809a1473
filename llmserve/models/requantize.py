"""Weights in a form for which llama.cpp has kernels that multiply them with several tokens at once.

It has none for Q4_1 and Q5_1 on most processors: a pass of eight tokens does everything but reading eight times over. As Q8_0
their numbers stay what they are to 1/254 of the largest of 32, which is what the library rounds activations to in any case.
"""

from __future__ import annotations

import json
import logging
import platform
import sys
from importlib.metadata import version
from pathlib import Path

from llmserve.config import ModelSpec
from llmserve.engine import matmul
from llmserve.engine.gguf import GGUFFile
from llmserve.errors import ModelFileError
from llmserve.models import probe
from llmserve.models.files import derived

log = logging.getLogger(__name__)

_WITHOUT_KERNELS = frozenset({"Q4_1", "Q5_1"})
_LARGEST = 512 * 1024**2
"""Bytes of a file that nobody has asked to make larger: one token alone takes as much longer as there is more to read."""


def is_wanted(spec: ModelSpec, header: GGUFFile, repack: bool) -> bool:
    """Whether a model's weights are to become Q8_0: as configured, else where several tokens gain what one may lose."""
    if spec.weights != "auto":
        return spec.weights == "q8_0" and _share(header, frozenset({"Q8_0"})) < 0.9  # what is left are vectors
    # With kernels of ours several tokens take as long in Q4_1 as in Q8_0, and one less.
    ours = repack and matmul.process.will_have_kernels(claimed=spec.isolation == "process")
    return (
        header.size <= _LARGEST
        and _share(header, _WITHOUT_KERNELS - (matmul.OURS if ours else set())) > 0.5
        and spec.gpu_layers == 0
        and platform.machine() in ("x86_64", "AMD64")  # on others it was not measured
        and not (repack and "amx_int8" in probe.processor_flags())  # there repacked weights of these types have kernels
    )


def requantize(source: Path, cache_dir: Path) -> Path:
    """A file in `cache_dir` with the model of `source` and weights in Q8_0, made once; `source` where that is not possible."""
    try:
        recipe = ("Q8_0", version("llama_cpp_python"))
        return derived(source, cache_dir / "requantized", recipe, lambda target: _in_child(source, target))
    except (OSError, ModelFileError) as error:
        log.warning("the weights of %s stay as they are, and are slower: %s", source.name, error)
        return source


def _share(header: GGUFFile, types: frozenset[str]) -> float:
    """Of a file's weights those of some types, by their bytes."""
    sizes = [(tensor.type.name in types, tensor.num_bytes) for tensor in header.tensors]
    return sum(size for found, size in sizes if found) / max(1, sum(size for _, size in sizes))


def _in_child(source: Path, target: Path) -> None:
    """A broken file may kill the process that opens it."""
    log.info("making the weights of %s Q8_0", source.name)
    probe.in_child("llmserve.models.requantize", [str(source), str(target)], source)


def _main(arguments: str) -> None:
    probe.be_a_child()
    from llmserve.engine import llamacpp_backend

    source, target = json.loads(arguments)
    try:
        llamacpp_backend.requantize(Path(source), Path(target))
    except RuntimeError as error:
        sys.exit(f"\n{error}")


if __name__ == "__main__":
    _main(sys.argv[1])
