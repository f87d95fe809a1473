"""python -m llmserve.models.child MODEL DESCRIPTOR PARENT: the process of a model's engine. MODEL is for who reads `ps`."""

from __future__ import annotations

import os
import resource
import socket
import sys
from dataclasses import replace

from llmserve.engine import matmul
from llmserve.engine.channel import Channel, Open
from llmserve.engine.child import EngineChild, live
from llmserve.engine.compute import ComputeBudget
from llmserve.engine.engine import Engine
from llmserve.engine.statistics import StatisticsCounter
from llmserve.models import probe


def _open(message: Open, budget: ComputeBudget) -> Engine:
    """The first load of a file is its probe. The queue is the server's; here one is needed for as long as a hand-over takes."""
    model, cache_dir = message.model
    probe.check(model.path, model.trial, cache_dir)
    spec = replace(model.spec, max_waiting=model.spec.slots)
    engine: Engine = replace(model, spec=spec).open(budget, StatisticsCounter(), reads_text=False)
    return engine


def _main(descriptor: int, parent: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    matmul.process.claim()
    channel = Channel(socket.socket(fileno=descriptor))
    live(channel, parent)
    EngineChild(channel, _open).run()
    os._exit(0)  # nothing here has to be tidied up, and the model's threads may be in a pass


if __name__ == "__main__":
    _main(int(sys.argv[2]), int(sys.argv[3]))
