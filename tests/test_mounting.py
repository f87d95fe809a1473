"""The app is any WSGI application: in Flask and in Django, under other servers than gunicorn, and by the letter of PEP 3333."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from wsgiref.validate import validator

import django.conf
import flask
import pytest
import waitress
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse
from django.urls import path
from waitress import wasyncore
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.serving import make_server
from werkzeug.test import Client

from llmserve.config import RESERVED_THREADS
from tests.api import conftest
from tests.api.conftest import CHAT, MODEL, TIMEOUT, chat_body
from tests.fakes import say

serve, served = conftest.serve, conftest.served  # fixtures

ANSWER = "It is raining."
SECONDS_PER_TOKEN = 0.02  # of the model that clients do not wait for


def in_flask(app):
    outer = flask.Flask(__name__)
    outer.add_url_rule("/", view_func=lambda: "outer", endpoint="index")
    outer.wsgi_app = DispatcherMiddleware(outer.wsgi_app, {"/llm": app})
    return outer


def in_django(app):
    if not django.conf.settings.configured:
        pages = (path("", lambda request: HttpResponse("outer")),)
        django.conf.settings.configure(ROOT_URLCONF=pages, ALLOWED_HOSTS=["localhost"], LOGGING_CONFIG=None)
    return DispatcherMiddleware(get_wsgi_application(), {"/llm": app})


@pytest.mark.parametrize("mount", [in_flask, in_django])
class TestUnderAPrefix:
    def test_both_applications_answer(self, served, mount):
        client = Client(mount(served.app))
        assert client.get("/", buffered=True).text == "outer"
        assert client.get("/llm/health").json["status"] == "healthy"
        assert client.get(f"/llm/v1/models/{MODEL}").json["id"] == MODEL

    def test_each_says_in_its_own_way_what_there_is_not(self, served, mount):
        client = Client(mount(served.app))
        assert client.get("/llm/nothing").json["error"]["code"] == "unknown_url"
        outer = client.get("/v1/models", buffered=True)
        assert (outer.status_code, outer.mimetype) == (404, "text/html")

    def test_a_chat_is_answered(self, serve, mount):
        client = Client(mount(serve(say(ANSWER)).app))
        answer = client.post(f"/llm{CHAT}", json=chat_body(temperature=0), buffered=True)
        assert answer.json["choices"][0]["message"]["content"] == ANSWER

    def test_a_stream_comes_as_it_is_made(self, serve, mount):
        served = serve(say(ANSWER))
        client = Client(mount(served.app))
        with served.held() as let_go:
            response = client.post(f"/llm{CHAT}", json=chat_body(temperature=0, stream=True))
            assert any(b'"content":"I"' in write for write in response.response)
            let_go()
            rest = response.data
        assert rest.count(b'"content"') == len(ANSWER) - 1
        assert rest.endswith(b"data: [DONE]\n\n")
        response.close()


@contextmanager
def in_waitress(app):
    """It notices a client that leaves only where it may look ahead."""
    sockets = {}
    server = waitress.create_server(app, map=sockets, host="127.0.0.1", port=0, channel_request_lookahead=1)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server.effective_port
    finally:
        with suppress(OSError):  # its thread was awake and is done already
            server.trigger.pull_trigger(lambda: wasyncore.close_all(sockets))  # in its own thread, which ends without sockets
        thread.join(TIMEOUT)
        server.task_dispatcher.shutdown()


@contextmanager
def in_werkzeug(app):
    with make_server("127.0.0.1", 0, app, threaded=True) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.port
        finally:
            server.shutdown()
            thread.join(TIMEOUT)


@contextmanager
def ask(port, **parameters):
    """A connection on which a chat has been asked for."""
    connection = HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    connection.request("POST", CHAT, json.dumps(chat_body(**parameters)), {"Content-Type": "application/json"})
    try:
        yield connection
    finally:
        connection.close()


@pytest.mark.slow
@pytest.mark.parametrize("run", [in_waitress, in_werkzeug])
class TestUnderAnotherServer:
    def test_a_chat_is_answered(self, serve, run):
        with run(serve(say(ANSWER)).app) as port, ask(port, temperature=0) as connection:
            answer = json.load(connection.getresponse())
        assert answer["choices"][0]["message"]["content"] == ANSWER

    def test_a_stream_comes_as_it_is_made(self, serve, run):
        served = serve(say(ANSWER))
        with run(served.app) as port, served.held() as let_go, ask(port, temperature=0, stream=True) as connection:
            response = connection.getresponse()
            first, _, second = response.readline(), response.readline(), response.readline()
            assert b'"role":"assistant"' in first
            assert b'"content":"I"' in second
            let_go()
            rest = response.read()
        assert rest.count(b'"content"') == len(ANSWER) - 1
        assert rest.endswith(b"data: [DONE]\n\n")

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
    def test_a_client_that_leaves_frees_the_slot_and_the_thread(self, serve, run, stream):
        served = serve(threads=RESERVED_THREADS + 1)
        pace = threading.Event()
        served.backend.on_forward = lambda: pace.wait(SECONDS_PER_TOKEN)
        with run(served.app) as port:
            with ask(port, stream=stream) as connection:
                conftest.wait_until(lambda: served.status.running == 1)
                if stream:
                    connection.getresponse().readline()
            served.wait_until_idle(timeout=1.0)
            assert served.status.statistics.cancelled == 1
            with ask(port, max_tokens=1) as connection:
                assert connection.getresponse().status == 200


REQUESTS = {
    "start page": ("GET", "/", None),
    "health": ("GET", "/health", None),
    "HEAD": ("HEAD", "/v1/models", None),
    "OPTIONS": ("OPTIONS", CHAT, None),
    "whole": ("POST", CHAT, chat_body(max_tokens=3)),
    "stream": ("POST", CHAT, chat_body(max_tokens=3, stream=True)),
    "bad parameter": ("POST", CHAT, chat_body(temperature=3)),
    "unknown URL": ("GET", "/nothing", None),
    "wrong method": ("DELETE", CHAT, None),
    "action": ("POST", f"/v1/models/{MODEL}?action=load", None),
}


class TestTheLetterOfWSGI:
    @pytest.mark.parametrize("buffered", [True, False], ids=["read", "broken off"])
    @pytest.mark.parametrize(("method", "url", "body"), REQUESTS.values(), ids=REQUESTS)
    def test_no_answer_violates_it(self, served, method, url, body, buffered):
        client = Client(validator(served.app))
        client.open(url, method=method, json=body, headers={"Origin": "http://localhost"}, buffered=buffered).close()
