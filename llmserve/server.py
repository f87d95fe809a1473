"""The settings and hooks that make gunicorn right for this app, and the app right for gunicorn.

One process, for the models live in it; many threads, for each answer under way holds one; models are loaded after the
fork, for threads and locks do not survive one. The app ends its answers in order when the worker is told to stop.
"""

from __future__ import annotations

import gc
import logging
import queue
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from gunicorn.app.base import BaseApplication

from llmserve.config import Config, check_public
from llmserve.errors import ConfigError

_WORKER = "llmserve.worker.Worker"
_KEEPALIVE = 75  # seconds; clients reuse connections, and a proxy in front should close first
_HEARTBEAT = 60  # seconds without a sign of life of the worker's main loop; it is no limit for requests
_MARGIN = 5  # seconds gunicorn leaves the app beyond its own grace period, to send what it has to say


def settings(config: Config) -> dict[str, Any]:
    """gunicorn's settings by name (docs.gunicorn.org, "Settings")."""
    server = config.server
    return {
        "bind": server.bind,
        "workers": 1,
        "worker_class": _WORKER,
        "threads": server.threads,
        "worker_connections": max(1000, 4 * server.threads),
        "keepalive": _KEEPALIVE,
        "timeout": _HEARTBEAT,
        "graceful_timeout": int(server.grace_period) + _MARGIN,
        "loglevel": server.log_level,
        "control_socket_disable": True,  # nothing here is controlled through it, and all servers of a user would share one
        "proc_name": "llmserve",
        "on_starting": _on_starting(config),
        "post_fork": _post_fork,
        "post_worker_init": _post_worker_init(server.grace_period),
    }


class Server(BaseApplication):  # type: ignore[misc]
    """gunicorn with a configuration and an app of ours instead of a command line."""

    def __init__(self, config: Config) -> None:
        self._config = config
        super().__init__()

    def load_config(self) -> None:
        for name, value in settings(self._config).items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        from llmserve.app import create_app  # in the worker: whatever it starts must not be forked

        return create_app(self._config, owns_process=True)


def _on_starting(config: Config) -> Callable[[Any], None]:
    def on_starting(arbiter: Any) -> None:
        """Refuse what cannot work or is not safe, in one sentence, before anything listens; and say where the log goes."""
        logging.basicConfig(level=config.server.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        if arbiter.cfg.workers != 1 or arbiter.cfg.worker_class_str not in (_WORKER, "gthread"):
            sys.exit(
                "llmserve: it runs in one gthread worker, because the models live in the process: "
                "each worker would load its own, and only one would hear of a load or unload."
            )
        try:
            for bind in _binds(arbiter.cfg):
                if not bind.startswith(("unix:", "fd://")):
                    check_public(config, bind)
        except ConfigError as error:
            sys.exit(f"llmserve: {error}")

    return on_starting


def _binds(cfg: Any) -> list[str]:
    return cfg.bind if isinstance(cfg.bind, list) else [cfg.bind]


def _post_fork(arbiter: Any, worker: Any) -> None:
    """What the worker imports stays: to search it for garbage meanwhile would take a tenth of the time to the first answer."""
    gc.disable()


def _post_worker_init(grace_period: float) -> Callable[[Any], None]:
    def post_worker_init(worker: Any) -> None:
        """Tell the app where it listens, and close it when SIGTERM comes, not only when the worker ends: answers under way have the time between."""
        worker.wsgi.listens_on(_binds(worker.cfg))
        stop: queue.SimpleQueue[None] = queue.SimpleQueue()  # its put is reentrant, so a signal handler may call it

        def close_when_told() -> None:
            stop.get()
            worker.wsgi.close(grace_period)

        threading.Thread(target=close_when_told, name="llmserve-close", daemon=True).start()
        end_worker = signal.getsignal(signal.SIGTERM)

        def on_sigterm(number: int, frame: FrameType | None) -> None:
            stop.put(None)
            if callable(end_worker):
                end_worker(number, frame)

        signal.signal(signal.SIGTERM, on_sigterm)
        gc.freeze()
        gc.enable()

    return post_worker_init
