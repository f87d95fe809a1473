"""Start a peer from the environment that has it: `python launch.py NAME {"model": …, "port": …, "threads": …, "slots": …,
"context_length": …, "repack": …}`. It stands alone: nothing of llmserve is there.
"""

from __future__ import annotations

import json
import runpy
import signal
import sys
from typing import Any


def llama_server(options: dict[str, Any]) -> None:
    """The server of llama.cpp, as the package xllamacpp embeds it."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options["model"]
    params.port = options["port"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options["threads"]
    params.n_parallel = options["slots"]
    params.n_ctx = options["slots"] * options["context_length"]
    params.no_extra_bufts = not options["repack"]
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.pause()


def llama_cpp_python(options: dict[str, Any]) -> None:
    """llama-cpp-python's own server. It has no switch for the weights' layout, so the library's default is changed."""
    import llama_cpp.llama_cpp as library

    if not options["repack"]:
        default_params = library.llama_model_default_params

        def plain_params() -> Any:
            params = default_params()
            params.use_extra_bufts = False
            return params

        library.llama_model_default_params = plain_params
    settings = {
        "model": options["model"],
        "port": options["port"],
        "n_ctx": options["context_length"],
        "n_threads": options["threads"],
        "n_threads_batch": options["threads"],
        "interrupt_requests": False,
    }
    sys.argv[1:] = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    runpy.run_module("llama_cpp.server", run_name="__main__")


if __name__ == "__main__":
    {"llama-server": llama_server, "llama_cpp.server": llama_cpp_python}[sys.argv[1]](json.loads(sys.argv[2]))
