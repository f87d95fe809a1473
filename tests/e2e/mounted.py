"""An application that mounts the server, as each worker of a pre-forking server imports it."""

import os

from werkzeug.middleware.dispatcher import DispatcherMiddleware

from llmserve import create_app


def outer(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]


app = DispatcherMiddleware(outer, {"/llm": create_app()})
