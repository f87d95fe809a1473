"""What a WSGI server is pointed at: `gunicorn -c python:llmserve.gunicorn_conf llmserve.wsgi:app`."""

from llmserve.app import create_app

app = create_app(owns_process=True)
