"""The words a person types: `llmserve serve` and `llmserve pull`."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path

from llmserve import __version__, config
from llmserve.config import Config
from llmserve.errors import ConfigError, ModelFileError


def main(arguments: list[str] | None = None) -> int:
    """Run a command; its exit status: 0, or 1 with one sentence on standard error."""
    options = _parser().parse_args(arguments)
    try:
        settings = config.load(options.config)
        return int(options.run(settings, options))
    except (ConfigError, ModelFileError) as error:
        print(f"llmserve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llmserve", description="Serve language models over the OpenAI API.")
    parser.add_argument("--version", action="version", version=f"llmserve {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="run the server")
    serve.add_argument("--bind", metavar="HOST:PORT", help="where to listen, instead of the configuration's address")
    serve.set_defaults(run=_serve)
    pull = commands.add_parser("pull", help="fetch the configured models, so that serving them does not have to")
    pull.add_argument("models", nargs="*", metavar="MODEL", help="ids or aliases; all of them when none is named")
    pull.set_defaults(run=_pull)
    for command in (serve, pull):
        command.add_argument("--config", type=Path, metavar="FILE", help="TOML file; LLMSERVE_CONFIG names it too")
    return parser


def _serve(settings: Config, options: argparse.Namespace) -> int:
    from llmserve.server import Server

    if options.bind:
        config.split_bind(options.bind)
        settings = replace(settings, server=replace(settings.server, bind=options.bind))
    Server(settings).run()
    return 0


def _pull(settings: Config, options: argparse.Namespace) -> int:
    from llmserve.models import sources

    logging.basicConfig(level=settings.server.log_level.upper(), format="%(message)s")
    specs = [spec for spec in settings.models if not options.models or set(options.models) & set(spec.names)]
    known = {name for spec in settings.models for name in spec.names}
    for name in options.models:
        if name not in known:
            raise ConfigError(f"{name} is no configured model; there are {', '.join(spec.id for spec in settings.models)}.")
    for spec in specs:
        path = sources.fetch(spec, settings.server.cache_folder)
        print(f"{spec.id}: {path}")
    return 0
