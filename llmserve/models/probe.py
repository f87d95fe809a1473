"""Open a model file in a child process and evaluate a few tokens, for a broken file kills the process that opens it.

The verdict is remembered by the file's identity and the library's build, so that only a file's first load pays.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import platform
import signal
import subprocess
import sys
from contextlib import closing, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llmserve.engine import matmul
from llmserve.errors import ModelCrashed, ModelFileError
from llmserve.models.files import fingerprint, identity

if TYPE_CHECKING:  # it imports numpy
    from llmserve.engine.backend import Logits

log = logging.getLogger(__name__)

_TIMEOUT = 300.0  # seconds; a large file comes from a slow disk
_NO_REPACKING = "without repacked weights, of which this build of it dies on this processor, and slower for that"
_GGML_CHUNK = 8  # tokens; as many as the library evaluates in one go unless told otherwise


class Trial(NamedTuple):
    """How a file is opened: by which engine, and the settings that decide whether its library survives it."""

    engine: str
    context_length: int
    model_type: str = ""
    repack: bool = False


def probe(path: Path, trial: Trial, cache_dir: Path) -> None:
    """Return when a library can open `path` and evaluate tokens; else raise ModelFileError with what it said or died of.

    Only good verdicts are remembered: a bad one may have had a passing reason, such as memory.
    """
    verdict = _verdict(path, trial, cache_dir)
    if verdict.exists():
        return
    log.info("probing %s", path.name)
    in_child("llmserve.models.probe", [str(path), *trial], path)
    remember(verdict)


def in_child(module: str, arguments: list[object], path: Path) -> None:
    """Run a module that opens `path`, with its arguments as JSON, in a process that may die of it.

    Raises ModelFileError with the last thing it said unless it ends with status 0; ModelCrashed when a signal ended it.
    """
    # -u, and one pipe for all: C's stdio must not be buffered either, for what is in a buffer dies with its process.
    command = [sys.executable, "-u", "-m", module, json.dumps(arguments)]
    try:
        child = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise ModelFileError(f"{path.name} could not be opened within {_TIMEOUT:g} s.") from None
    if child.returncode:
        error = ModelCrashed if child.returncode < 0 else ModelFileError
        raise error(f"{path.name} cannot be loaded: {_reason(child).replace(str(path), path.name)}.")


def be_a_child() -> None:
    """For the process that `in_child` starts: leave no core file, and say the library's errors where they are looked for."""
    import resource

    matmul.process.claim()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.basicConfig(level=logging.ERROR, stream=sys.stdout, format="%(message)s")


def check(path: Path, trial: Trial, cache_dir: Path) -> None:
    """The same in this process, which may die of it, and goes on with nothing of it open."""
    verdict = _verdict(path, trial, cache_dir)
    if verdict.exists():
        return
    try:
        error = _TRIALS[trial.engine](path, trial)
    except RuntimeError:
        os._exit(1)  # the library has said why, if it ever does
    if error:
        raise ModelFileError(f"{path.name} cannot be loaded: {error}.")
    remember(verdict)


def processor() -> str:
    """16 hexadecimal digits for what this machine's processors can do, on which depends what code of a library runs."""
    flags = processor_flags()
    return fingerprint(flags) if flags else fingerprint(platform.platform())


def processor_flags() -> list[str]:
    """The features of this machine's processors, where /proc/cpuinfo has them: of x86 ones on Linux."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("flags"):
                return line.split()[2:]
    return []


def no_repack_note(cache_dir: Path) -> Path:
    """What exists when this build of llama.cpp has died of repacked weights on this kind of processor."""
    return cache_dir / "probed" / f"no-repack-llamacpp-{_build('llamacpp')}-{processor()}"


def _verdict(path: Path, trial: Trial, cache_dir: Path) -> Path:
    """What exists when the file is known to be good."""
    name = f"{identity(path)}-{trial.engine}-{_build(trial.engine)}-{trial.context_length}{trial.model_type}{'-tuned' * trial.repack}"
    return cache_dir / "probed" / name


def explain(reason: str, trial: Trial) -> str:
    """Why a library runs a model, and how if that is not the best way."""
    return f"{reason}; {_NO_REPACKING}" if trial.engine != "ctransformers" and not trial.repack else reason


def _build(engine: str) -> str:
    """16 hexadecimal digits for the library as it is installed: another compiler or another option may make what died live."""
    distribution, package = _LIBRARIES[engine]
    found = importlib.util.find_spec(package)
    folders = [*map(Path, found.submodule_search_locations or ())] if found is not None else []
    if package == "llama_cpp":
        folders.append(Path(matmul.__file__).parent)  # where our kernels for it are
    return fingerprint(version(distribution), *map(shared_libraries, folders))


def shared_libraries(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each in a folder, at any depth."""
    files = sorted(path for path in folder.rglob("*") if {".so", ".dylib"} & set(path.suffixes))
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def remember(note: Path) -> None:
    """Make an empty file. A folder that cannot be written to costs a probe at each load, no more."""
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()


def _reason(child: subprocess.CompletedProcess[bytes]) -> str:
    """The last thing the library said; failing that, how its process ended."""
    lines = [line.strip() for line in child.stdout.decode(errors="replace").splitlines() if line.strip()]
    said = lines[-1].rstrip(".") if lines else ""
    if child.returncode < 0:
        death = f"the library crashed with {signal.Signals(-child.returncode).name}"
        return f"{death} ({said})" if said else death
    return said or "the library refuses it"


def _main(arguments: str) -> None:
    """The child: it prints what is wrong behind what the library has printed. Cleans nothing up."""
    be_a_child()
    path, *settings = json.loads(arguments)
    trial = Trial(*settings)
    try:
        error = _TRIALS[trial.engine](Path(path), trial)
    except RuntimeError:
        os._exit(1)  # the library has said why, if it ever does
    print(f"\n{error}", flush=True)
    os._exit(1 if error else 0)


def _try_ctransformers(path: Path, trial: Trial) -> str:
    """What goes wrong, if anything, at the beginning of the context, and at its end: there the library's buffers are fullest,
    and for its older types they are of a size that was thought to do."""
    from llmserve.engine.ctransformers_backend import CTransformersBackend

    with closing(CTransformersBackend(path, trial.context_length, trial.model_type)) as backend:
        num_tokens = min(_GGML_CHUNK if trial.model_type else 1, backend.context_length)
        token_ids = [min(1, backend.vocab_size - 1)] * num_tokens
        try:
            backend.forward(token_ids, 0, 1)
            if not _finite(backend.logits()):
                return _NOT_FINITE
            backend.forward(token_ids, backend.context_length - num_tokens, 1)
        except RuntimeError as error:
            return str(error)
    return ""


def _try_llamacpp(path: Path, trial: Trial) -> str:
    """What goes wrong, if anything, with one token and with several, for which the library has code of its own: with tiles and without."""
    from llmserve.engine.backend import Piece
    from llmserve.engine.llamacpp_backend import TILES_FROM, LlamaCppBackend, LlamaCppSettings

    settings = LlamaCppSettings(repack=trial.repack, tiles_from=TILES_FROM)
    try:
        with closing(LlamaCppBackend(path, trial.context_length, 1, 32, settings)) as backend:
            token_id = min(1, backend.vocab_size - 1)
            for position, num_tokens in ((0, 16), (16, 8), (24, 1)):
                backend.forward([Piece(0, position, [token_id] * num_tokens, True)], 1)
                if not _finite(backend.logits(0)):
                    return _NOT_FINITE
    except RuntimeError as error:
        return str(error)
    return ""


def _try_llamacpp_embeddings(path: Path, trial: Trial) -> str:
    """What goes wrong, if anything, with the vector of a short text. The trial's model type is the pooling."""
    from llmserve.engine.llamacpp_backend import LlamaCppSettings
    from llmserve.engine.llamacpp_embedder import LlamaCppEmbedder

    try:
        settings = LlamaCppSettings(repack=trial.repack)
        with closing(LlamaCppEmbedder(path, trial.context_length, trial.model_type, settings)) as embedder:
            vector = embedder.embed([min(1, embedder.vocab_size - 1)] * min(8, trial.context_length), 1)
    except RuntimeError as error:
        return str(error)
    return "" if _finite(vector) else _NOT_FINITE


def _finite(logits: Logits) -> bool:
    return bool((abs(logits) < float("inf")).all())


_NOT_FINITE = "its scores are not finite numbers"
_LIBRARIES = {  # as pip and as Python name them
    "ctransformers": ("ctransformers", "ctransformers"),
    "llamacpp": ("llama_cpp_python", "llama_cpp"),
    "llamacpp-embeddings": ("llama_cpp_python", "llama_cpp"),
}
_TRIALS = {
    "ctransformers": _try_ctransformers,
    "llamacpp": _try_llamacpp,
    "llamacpp-embeddings": _try_llamacpp_embeddings,
}

if __name__ == "__main__":
    _main(sys.argv[1])
