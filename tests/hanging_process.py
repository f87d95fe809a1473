"""python -m tests.hanging_process HOW DESCRIPTOR PARENT: an engine's process that, asked for tokens, never lets go of the GIL."""

import ctypes
import re
import socket
import sys

from llmserve.engine.channel import Channel, Opened, Tokenize
from llmserve.engine.child import EngineChild, live

HANGS = {
    "sleeps": lambda: ctypes.PyDLL(None).sleep(60),
    "computes": lambda: re.match("(a|aa)+$", "a" * 60 + "b"),
}


class HangingChild(EngineChild):
    def __init__(self, channel, how):
        super().__init__(channel, open_engine=None)
        self._hang = HANGS[how]

    def _open(self, message):
        self._channel.send(Opened(None))

    def _take(self, message):
        if isinstance(message, Tokenize):
            self._hang()
        super()._take(message)


if __name__ == "__main__":
    channel = Channel(socket.socket(fileno=int(sys.argv[2])))
    live(channel, int(sys.argv[3]))
    HangingChild(channel, sys.argv[1]).run()
