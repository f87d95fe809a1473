"""What `gunicorn -c python:llmserve.gunicorn_conf llmserve.wsgi:app` reads: settings are module attributes there."""

import sys as _sys

# Under private names: gunicorn would take an attribute named `config` for its setting of that name.
from llmserve import config as _config
from llmserve import server as _server
from llmserve.errors import ConfigError as _ConfigError

try:
    globals().update(_server.settings(_config.load()))
except _ConfigError as error:
    _sys.exit(f"llmserve: {error}")
