"""What `gunicorn -c python:llmserve.gunicorn_conf llmserve.wsgi:app` reads: settings are module attributes there."""

import sys

from llmserve import config, server
from llmserve.errors import ConfigError

try:
    globals().update(server.settings(config.load()))
except ConfigError as error:
    sys.exit(f"llmserve: {error}")
