"""What the app does with every request, and how it ends."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import threading
from itertools import islice

import pytest
from werkzeug.test import Client, EnvironBuilder

from llmserve import create_app
from llmserve.config import RESERVED_THREADS, ModelSpec
from llmserve.engine.generation import GenerationParams
from llmserve.errors import ConfigError
from tests.api import conftest
from tests.api.conftest import ALIAS, CHAT, MODEL, TIMEOUT, chat_body, wait_until
from tests.fakes import say

serve, served = conftest.serve, conftest.served  # fixtures

MAX_WAITING = ModelSpec("", "").max_waiting
LOAD = f"/v1/models/{MODEL}?action=load"
GET_URLS = ["/", "/health", "/livez", "/readyz", "/v1/models", f"/v1/models/{MODEL}"]
ANSWER = "It is raining."


def stream(served, content="Hello", **parameters):
    """A streamed chat whose first write has been read; the caller closes it."""
    return served.client.post(CHAT, json=chat_body(content, stream=True, **parameters))


def payload(event):
    return json.loads(event.removeprefix("data: "))


def chunks(response):
    """What a stream that ends well brings, read to its end."""
    *events, done, nothing = response.text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    return [payload(event) for event in events]


def text(chunks):
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def begin(app, **request):
    """Call the app as a server does, and read nothing."""
    environ = EnvironBuilder(CHAT, method="POST", json=chat_body(**request)).get_environ()
    started = []
    body = app(environ, lambda status, headers: started.append(status))
    assert started == ["200 OK"]
    return body


class TestAnswers:
    def test_a_chat_is_answered_whole(self, serve):
        answer = serve(say(ANSWER)).chat(temperature=0).json
        assert (answer["object"], answer["model"]) == ("chat.completion", MODEL)
        assert answer["choices"] == [
            {
                "index": 0,
                "message": {"role": "assistant", "content": ANSWER, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ]
        assert answer["usage"]["completion_tokens"] == len(ANSWER)

    def test_a_chat_is_answered_as_a_stream(self, serve):
        received = chunks(stream(serve(say(ANSWER)), temperature=0))
        assert text(received) == ANSWER
        assert received[-1]["choices"][0]["finish_reason"] == "stop"

    def test_the_model_that_answered_is_named_whatever_it_was_called(self, served):
        assert served.chat(model=ALIAS, max_tokens=1).json["model"] == MODEL

    def test_every_choice_is_streamed_under_its_index(self, served):
        *received, usage = chunks(stream(served, n=3, max_tokens=4, stream_options={"include_usage": True}))
        choices = [chunk["choices"][0] for chunk in received]
        assert [choice["index"] for choice in choices[:3]] == [0, 1, 2]
        assert sorted(choice["index"] for choice in choices if choice["finish_reason"]) == [0, 1, 2]
        assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 12)

    def test_a_determined_answer_is_repeated_from_memory_also_as_a_stream(self, served):
        first, again = served.chat(seed=1, max_tokens=5), served.chat(seed=1, max_tokens=5)
        streamed = stream(served, seed=1, max_tokens=5)
        assert [answer.headers["X-Cache"] for answer in (first, again, streamed)] == ["miss", "hit", "hit"]
        assert ("Age" in first.headers, again.headers["Age"]) == (False, "0")
        assert first.json["choices"] == again.json["choices"]
        assert text(chunks(streamed)) == first.json["choices"][0]["message"]["content"]

    @pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
    def test_an_engine_that_fails_before_its_first_word_still_gets_its_status(self, served, streamed):
        served.backend.on_forward = lambda: 1 // 0
        answer = served.chat(stream=streamed)
        assert (answer.status_code, answer.mimetype) == (500, "application/json")
        assert answer.json["error"]["code"] == "engine_failed"

    def test_an_engine_that_fails_later_ends_the_stream_with_an_error_event(self, served):
        passes = iter(range(10, -1, -1))
        served.backend.on_forward = lambda: 1 // next(passes)
        first, *_, last = stream(served).text.split("\n\n")[:-1]
        assert payload(first)["choices"][0]["delta"]["role"] == "assistant"
        assert payload(last)["error"]["code"] == "engine_failed"

    def test_an_answer_that_takes_too_long_is_given_up(self, serve):
        served = serve(request_timeout=0.1)
        with served.held():
            answer = served.chat()
        assert (answer.status_code, answer.json["error"]["code"]) == (504, "deadline_exceeded")

    def test_a_stream_that_takes_too_long_ends_with_an_error_event(self, serve):
        served = serve(request_timeout=0.6)
        with served.held():
            *_, last = stream(served).text.split("\n\n")[:-1]
        assert payload(last)["error"]["code"] == "deadline_exceeded"

    def test_a_silent_stream_is_kept_alive_by_comments(self, serve):
        served = serve(ping_interval=0.1)
        with served.held():
            response = stream(served)
            assert b": ping\n" in islice(response.response, 3)
            response.close()

    def test_what_breaks_unforeseen_is_a_500_that_says_nothing_and_is_logged(self, served, monkeypatch, caplog):
        monkeypatch.setattr(served.registry, "resolve", lambda name: 1 // 0)
        answer = served.chat()
        assert (answer.status_code, answer.json["error"]["code"]) == (500, "internal_error")
        assert "division" not in answer.text
        assert "ZeroDivisionError" in caplog.text


class TestRequestIds:
    def test_each_answer_has_its_own(self, served):
        answers = [
            served.client.get("/health"),
            served.client.get("/health"),
            served.client.get("/nothing"),
            served.chat(max_tokens=1),
        ]
        ids = {answer.headers["X-Request-Id"] for answer in answers}
        assert len(ids) == 4
        assert all(re.fullmatch(r"req_[0-9a-f]{24}", each) for each in ids)

    @pytest.mark.parametrize("given", ["abc-123", "trace:4bf92f/1=@+", "x" * 128])
    def test_a_clients_own_is_kept(self, served, given):
        assert served.client.get("/health", headers={"X-Request-Id": given}).headers["X-Request-Id"] == given

    @pytest.mark.parametrize("given", ["", "a b", "x" * 129, "é", '"'])
    def test_one_that_is_no_good_for_headers_and_logs_is_replaced(self, served, given):
        assert served.client.get("/health", headers={"X-Request-Id": given}).headers["X-Request-Id"].startswith("req_")

    def test_the_time_that_it_took_is_told(self, served):
        assert served.client.get("/health").headers["openai-processing-ms"].isdecimal()


class TestMethods:
    @pytest.mark.parametrize("url", [*GET_URLS, "/nothing"])
    def test_head_has_the_headers_of_get_and_no_body(self, served, url):
        head, get = served.client.head(url, buffered=True), served.client.get(url, buffered=True)
        assert head.status == get.status
        assert head.data == b""
        assert list(head.headers.keys()) == list(get.headers.keys())
        assert head.mimetype == "application/json"

    @pytest.mark.parametrize(("url", "allowed"), [("/health", "GET, HEAD, OPTIONS"), (CHAT, "POST, OPTIONS")])
    def test_options_tells_what_is_allowed(self, served, url, allowed):
        answer = served.client.options(url)
        assert (answer.status_code, answer.headers["Allow"], answer.data) == (204, allowed, b"")

    def test_a_wrong_method_is_told_the_right_ones(self, served):
        assert served.client.get(CHAT).headers["Allow"] == "POST, OPTIONS"

    def test_options_of_nothing_is_not_found(self, served):
        assert served.client.options("/nothing").status_code == 404

    def test_the_start_page_lists_the_urls(self, served):
        listed = served.client.get("/").json["endpoints"]
        assert {"GET /health", f"POST {CHAT}", "GET /v1/models/<path:name>"} <= set(listed)


class TestBrowsers:
    ORIGIN = "http://localhost:3000"

    def preflight(self, served, origin, url=CHAT):
        headers = {
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
        }
        return served.client.options(url, headers=headers)

    def test_a_page_of_this_machine_may_send_what_it_asks_to_send(self, serve):
        answer = self.preflight(serve(api_keys=("sk-1",)), self.ORIGIN)
        assert answer.status_code == 204
        assert answer.headers["Access-Control-Allow-Origin"] == self.ORIGIN
        assert answer.headers["Access-Control-Allow-Headers"] == "authorization,content-type,x-stainless-lang"
        assert "POST" in answer.headers["Access-Control-Allow-Methods"]
        assert int(answer.headers["Access-Control-Max-Age"]) > 0

    def test_a_page_may_ask_for_what_is_not_there_to_be_told_so(self, served):
        assert self.preflight(served, self.ORIGIN, "/nothing").status_code == 204

    def test_a_foreign_page_is_allowed_nothing(self, served):
        answer = self.preflight(served, "https://evil.example")
        assert "Access-Control-Allow-Origin" not in answer.headers

    def test_a_foreign_page_is_allowed_by_configuration(self, serve):
        served = serve(cors_origins=("https://app.example",))
        assert self.preflight(served, "https://app.example").headers["Access-Control-Allow-Origin"] == "https://app.example"
        assert served.chat(headers={"Origin": "https://app.example"}, max_tokens=1).status_code == 200

    @pytest.mark.parametrize("url", ["/v1/models", "/nothing", CHAT])
    def test_a_page_may_read_answers_and_errors_with_their_request_id(self, served, url):
        headers = served.client.get(url, headers={"Origin": self.ORIGIN}).headers
        assert headers["Access-Control-Allow-Origin"] == self.ORIGIN
        assert "X-Request-Id" in headers["Access-Control-Expose-Headers"]
        assert headers["Vary"] == "Origin"


class TestAccess:
    def test_a_key_opens_in_either_header_and_is_asked_for(self, serve):
        served = serve(api_keys=("sk-1", "sk-2"))
        for headers in ({"Authorization": "Bearer sk-1"}, {"authorization": "bearer sk-2"}, {"X-Api-Key": "sk-2"}):
            assert served.chat(headers=headers, max_tokens=1).status_code == 200
        refused = served.chat()
        assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")

    @pytest.mark.parametrize("url", ["/health", "/livez", "/readyz"])
    def test_probes_need_no_key(self, serve, url):
        assert serve(api_keys=("sk-1",)).client.get(url).status_code == 200

    @pytest.mark.parametrize(
        "host", ["localhost", "127.0.0.1:8080", "[::1]:8080", "LOCALHOST:1", "my.example", "My.Example:80"]
    )
    def test_known_hosts_are_answered(self, serve, host):
        assert serve(allowed_hosts=("my.example",)).client.get("/health", headers={"Host": host}).status_code == 200

    @pytest.mark.parametrize("options", [{"allowed_hosts": ("*",)}, {"bind": "0.0.0.0:80", "allow_public_without_keys": True}])
    def test_any_host_is_answered_where_that_is_wanted(self, serve, options):
        assert serve(**options).client.get("/health", headers={"Host": "evil.example"}).status_code == 200


class TestTheGate:
    def test_a_full_server_refuses_chats_and_answers_everything_else(self, serve):
        served = serve(threads=RESERVED_THREADS + 1)
        with served.held() as let_go:
            running = stream(served)
            refused = served.chat()
            assert (refused.status_code, refused.json["error"]["code"]) == (503, "queue_full")
            assert int(refused.headers["Retry-After"]) >= 1
            assert [served.client.get(url).status_code for url in GET_URLS] == [200] * len(GET_URLS)
            let_go()
            running.close()
        assert served.chat(max_tokens=1).status_code == 200

    def test_a_stream_that_is_never_read_frees_its_slot_and_its_thread(self, serve):
        served = serve(threads=RESERVED_THREADS + 1)
        with served.held() as let_go:
            body = begin(served.app, stream=True)
            assert served.status.running == 1
            body.close()
            let_go()
            served.wait_until_idle()
        assert served.status.statistics.cancelled == 1
        assert served.chat(max_tokens=1).status_code == 200

    def test_a_stream_that_breaks_off_frees_its_slot(self, served):
        with served.held() as let_go:
            body = begin(served.app, stream=True)
            next(iter(body))
            body.close()
            let_go()
            served.wait_until_idle()
        assert served.status.statistics.cancelled == 1

    def test_a_full_queue_refuses_with_the_time_to_wait(self, served):
        with served.held() as let_go:
            with served.registry.use(MODEL, lambda: None) as engine:
                waiting = [engine.submit([1], GenerationParams(max_tokens=2)) for _ in range(1 + MAX_WAITING)]
            refused = served.chat()
            assert (refused.status_code, refused.json["error"]["code"]) == (503, "queue_full")
            assert 1 <= int(refused.headers["Retry-After"]) <= 60
            for generation in waiting:
                generation.close()
            let_go()


class TestTheEnd:
    def test_what_is_under_way_goes_on_while_new_work_is_refused(self, serve):
        served = serve(say(ANSWER))
        with served.held() as let_go:
            running = stream(served, temperature=0)
            closing = threading.Thread(target=served.app.close, args=(TIMEOUT,))
            closing.start()
            wait_until(lambda: served.client.post(LOAD).status_code == 503)
            refused = served.chat()
            assert (refused.json["error"]["code"], refused.headers["Retry-After"]) == ("shutting_down", "1")
            assert served.client.post(LOAD).json["error"]["code"] == "shutting_down"
            assert served.client.get("/readyz").json == {"status": "draining"}
            assert served.client.get("/livez").status_code == served.client.get("/health").status_code == 200
            let_go()
            assert chunks(running)[-1]["choices"][0]["finish_reason"] == "stop"
        closing.join(TIMEOUT)
        assert served.loader.backends[0].closed

    def test_what_the_grace_period_is_too_short_for_ends_with_an_error_event(self, served):
        with served.held() as let_go:
            running = stream(served)
            closing = threading.Thread(target=served.app.close, args=(0.0,))
            closing.start()
            *_, last = running.text.split("\n\n")[:-1]
            let_go()
        closing.join(TIMEOUT)
        assert payload(last)["error"]["code"] == "shutting_down"


class TestTheLog:
    @pytest.fixture
    def lines(self, caplog):
        caplog.set_level(logging.INFO, "llmserve.app")
        return lambda: [record.getMessage() for record in caplog.records if record.name == "llmserve.app"]

    def test_a_request_is_one_line_with_counts_and_without_text(self, serve, lines):
        served = serve(say(ANSWER))
        answer = served.chat("My secret", temperature=0, user="me")
        (line,) = lines()
        usage = answer.json["usage"]
        assert line.startswith(f"{answer.headers['X-Request-Id']} POST {CHAT} 200 ")
        for part in (f"model={MODEL}", "cache=miss", "ttft=", "finish_reason=stop"):
            assert part in line
        assert f"output_tokens={usage['completion_tokens']} prompt_tokens={usage['prompt_tokens']}" in line
        assert not {"secret", "raining", "me"} & set(re.split(r"\W+", line))

    def test_a_stream_is_logged_when_it_has_ended(self, served, lines):
        response = stream(served, max_tokens=3)
        assert lines() == []
        response.get_data()
        response.close()
        (line,) = lines()
        assert "output_tokens=3" in line
        assert "finish_reason=length" in line

    def test_an_error_is_one_line_with_its_code_and_without_text(self, served, lines):
        served.chat(messages=[{"role": "secret", "content": "secret"}])
        (line,) = lines()
        assert f"POST {CHAT} 400 " in line
        assert " error=invalid_value" in line
        assert "secret" not in line

    def test_what_is_in_a_url_cannot_make_a_line_of_its_own(self, served, lines):
        served.client.get("/%0a2030-01-01 INFO all is well%e2%80%a8", buffered=True)
        (line,) = lines()
        assert len(line.splitlines()) == 1


class TestCreation:
    def test_an_app_is_made_of_a_file_or_of_what_the_environment_names(self, tmp_path, monkeypatch):
        path = tmp_path / "llmserve.toml"
        path.write_text('[[models]]\nid = "mine"\nsource = "mine.gguf"\nload = "on_demand"\n')
        monkeypatch.setenv("LLMSERVE_CONFIG", str(path))
        for app in (create_app(path), create_app(str(path)), create_app()):
            assert Client(app).get("/v1/models").json["data"][0]["id"] == "mine"
            app.close()

    def test_a_bad_file_stops_it(self, tmp_path):
        path = tmp_path / "llmserve.toml"
        path.write_text("[server]\nport = 1\n")
        with pytest.raises(ConfigError, match=r"server\.port"):
            create_app(path)

    def test_its_import_takes_nothing_that_only_models_need(self):
        script = "import sys, llmserve.app; print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        later = {"numpy", "tokenizers", "jinja2", "ctransformers", "requests", "llmserve.api.chat", "llmserve.api.schema"}
        assert not later & set(done.stdout.split())
