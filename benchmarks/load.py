"""A load generator in a process of its own: keep-alive connections that send one request over and over.

`python -m benchmarks.load PORT SECONDS CONNECTIONS` reads the raw request from standard input and prints requests per second.
"""

from __future__ import annotations

import selectors
import socket
import sys
import time


def length_of(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.split(b":")[1])
    raise ValueError("no Content-Length")


def main(port: int, seconds: float, num_connections: int, request: bytes) -> float:
    selector = selectors.DefaultSelector()
    for _ in range(num_connections):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(connection, selectors.EVENT_READ, bytearray())
        connection.sendall(request)
    answered, begun = 0, time.perf_counter()
    while (now := time.perf_counter()) < begun + seconds:
        for key, _ in selector.select(1.0):
            connection, received = key.fileobj, key.data
            received += connection.recv(65536)
            end = received.find(b"\r\n\r\n")
            if end < 0 or len(received) < end + 4 + length_of(received[:end]):
                continue
            if not received.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(received[:300].decode(errors="replace"))
            received.clear()
            answered += 1
            connection.sendall(request)
    return answered / (now - begun)


if __name__ == "__main__":
    print(main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.stdin.buffer.read()))
