"""Open a model file in a child process and evaluate one token, for a broken file kills the process that opens it.

The verdict is remembered by the file's identity and the library's version, so that only a file's first load pays.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from llmserve.errors import ModelFileError
from llmserve.models.files import identity

log = logging.getLogger(__name__)

_TIMEOUT = 300.0  # seconds; a large file comes from a slow disk


def probe(path: Path, context_length: int, model_type: str, cache_dir: Path) -> None:
    """Return when the library can open `path` and evaluate a token; else raise ModelFileError with what it said or died of.

    Only good verdicts are remembered: a bad one may have had a passing reason, such as memory.
    """
    verdict = cache_dir / "probed" / f"{identity(path)}-{version('ctransformers')}-{context_length}{model_type}"
    if verdict.exists():
        return
    log.info("probing %s", path.name)
    command = [sys.executable, "-m", "llmserve.models.probe", json.dumps([str(path), context_length, model_type])]
    try:
        child = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise ModelFileError(f"{path.name} could not be opened within {_TIMEOUT:g} s.") from None
    if child.returncode:
        raise ModelFileError(f"{path.name} cannot be loaded: {_reason(child)}.")
    verdict.parent.mkdir(parents=True, exist_ok=True)
    verdict.touch()


def _reason(child: subprocess.CompletedProcess[bytes]) -> str:
    """The last thing the library said; failing that, how its process ended."""
    lines = [line.strip() for line in child.stderr.decode(errors="replace").splitlines() if line.strip()]
    said = lines[-1].rstrip(".") if lines else ""
    if child.returncode < 0:
        death = f"the library crashed with {signal.Signals(-child.returncode).name}"
        return f"{death} ({said})" if said else death
    return said or f"the library ended with status {child.returncode}"


def _main(arguments: str) -> None:
    """The child: nothing of this process is worth keeping, so no cleaning up and no core file."""
    import resource

    from llmserve.engine.ctransformers_backend import CTransformersBackend

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    path, context_length, model_type = json.loads(arguments)
    try:
        backend = CTransformersBackend(Path(path), context_length, model_type)
        backend.forward([min(1, backend.vocab_size - 1)], 0, 1)
        finite = bool((abs(backend.logits()) < float("inf")).all())
    except Exception as error:
        sys.stderr.write(f"\n{error}\n")
        sys.stderr.flush()
        os._exit(1)
    if not finite:
        sys.stderr.write("\nits scores are not finite numbers\n")
        sys.stderr.flush()
    os._exit(0 if finite else 1)


if __name__ == "__main__":
    _main(sys.argv[1])
