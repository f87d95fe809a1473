import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.test import EnvironBuilder

from llmserve.api.connection import ClientGone
from llmserve.api.context import Request
from llmserve.api.responses import PING, Response, encode, error_response, event_stream, frame
from llmserve.errors import (
    EngineFailed,
    InvalidAPIKey,
    InvalidParameter,
    MethodNotAllowed,
    ModelLoadFailed,
    QueueFull,
    ShuttingDown,
)


@pytest.fixture
def request_():
    return Request(EnvironBuilder().get_environ())


def error_after(request, error, *writes):
    """What a stream sends that yields `writes` and raises `error`."""

    def body():
        yield from writes
        raise error

    return list(event_stream(request, body(), [], ping_interval=60))


@given(st.text())
def test_an_event_is_one_line_however_lines_are_counted(text):
    event = frame({"text": text})
    assert len(event.decode().splitlines()) == 2  # the data, and the empty line that ends it
    assert json.loads(event.removeprefix(b"data: ")) == {"text": text}


def test_text_is_sent_as_it_reads():
    assert encode("Größe 猫") == '"Größe 猫"'.encode()


def test_half_a_surrogate_pair_comes_out_as_the_escape_that_json_has_for_it():
    assert encode("\ud800") == b'"\\ud800"'


def test_an_error_has_all_four_keys():
    response = error_response(InvalidParameter("Wrong.", param="n", code="invalid_value"))
    body = {"message": "Wrong.", "type": "invalid_request_error", "param": "n", "code": "invalid_value"}
    assert (response.status, json.loads(b"".join(response))) == (400, {"error": body})


@pytest.mark.parametrize(
    ("error", "header"),
    [
        (QueueFull("full", retry_after=2.1), ("Retry-After", "3")),
        (ShuttingDown("bye"), ("Retry-After", "1")),
        (ModelLoadFailed("broken file"), ("x-should-retry", "false")),
        (MethodNotAllowed("no", allowed=("GET", "HEAD")), ("Allow", "GET, HEAD")),
        (InvalidAPIKey("no"), ("WWW-Authenticate", "Bearer")),
    ],
)
def test_an_error_tells_in_its_headers_what_to_do(error, header):
    assert header in error_response(error).headers


def test_a_message_that_repeats_much_is_cut():
    assert len(json.loads(b"".join(error_response(EngineFailed("x" * 5000))))["error"]["message"]) < 1000


def test_silence_is_filled_with_comments_that_end_no_event(request_):
    assert list(event_stream(request_, iter([b"", b"a", b""]), [], ping_interval=60)) == [b"a"]
    assert list(event_stream(request_, iter([b"", b"a", b""]), [], ping_interval=0)) == [PING, b"a", PING]
    assert PING.startswith(b":")
    assert PING.count(b"\n") == 1


def test_an_error_ends_a_stream_as_its_last_event(request_):
    first, last = error_after(request_, EngineFailed("broken"), b"a")
    assert first == b"a"
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "engine_failed"
    assert request_.record.error == "engine_failed"


def test_a_bug_ends_a_stream_without_its_words_on_the_wire(request_, caplog):
    caplog.set_level(logging.ERROR)
    (last,) = error_after(request_, KeyError("inner workings"))
    assert b"inner" not in last
    assert "inner workings" in caplog.text
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "internal_error"


def test_nothing_is_sent_to_a_client_that_left(request_):
    assert error_after(request_, ClientGone()) == []
    assert request_.record.error == "client_gone"


def test_a_stream_that_the_server_cannot_write_on_is_recorded(request_):
    response = event_stream(request_, iter([b"a", b"b"]), [], ping_interval=60)
    assert next(iter(response)) == b"a"
    response.close()
    assert request_.record.error == "client_gone"


def test_close_runs_what_was_registered_also_for_a_body_that_was_never_begun():
    closed = []
    response = Response(each for each in [b"a"])
    response.call_on_close(lambda: closed.append(1))
    response.close()
    assert closed == [1]
    assert list(response) == []
