"""What is only true of a whole chat: the response cache, several clients of one answer, the order of a stream's writes."""

import json
import threading

import pytest

from llmserve.api import chat
from tests.api.conftest import CHAT, chat_body, wait_until
from tests.fakes import say


def number_of_passes(served):
    return len(served.backend.passes)


def content(response):
    return response.json["choices"][0]["message"]["content"]


def events(response):
    return [json.loads(event.removeprefix("data: ")) for event in response.text.split("\n\n")[:-2]]


def streamed(response):
    return "".join(choice["delta"].get("content", "") for event in events(response) for choice in event["choices"])


class TestTheResponseCache:
    @pytest.mark.parametrize("determined", [{"temperature": 0}, {"seed": 7}])
    def test_a_determined_answer_is_generated_once(self, served, determined):
        first = served.chat(max_tokens=5, **determined)
        passes = number_of_passes(served)
        second = served.chat(max_tokens=5, **determined)
        third = served.chat(max_tokens=5, **determined)
        assert number_of_passes(served) == passes
        assert [each.headers["X-Cache"] for each in (first, second, third)] == ["miss", "hit", "hit"]
        assert "Age" not in first.headers
        assert second.headers["Age"] == "0"
        assert first.json["choices"] == second.json["choices"] == third.json["choices"]
        assert first.json["usage"] == second.json["usage"] == third.json["usage"]
        assert len({each.json["id"] for each in (first, second, third)}) == 3

    def test_an_answer_of_chance_is_generated_each_time(self, served):
        assert [served.chat(max_tokens=5).headers["X-Cache"] for _ in range(2)] == ["bypass", "bypass"]

    def test_a_stream_is_repeated_as_a_stream_with_the_same_pieces(self, served):
        first, second = (served.chat(temperature=0, max_tokens=5, stream=True) for _ in range(2))
        assert (first.headers["X-Cache"], second.headers["X-Cache"]) == ("miss", "hit")
        assert [event["choices"] for event in events(first)] == [event["choices"] for event in events(second)]
        assert len(events(second)) == 1 + 5 + 1

    def test_a_stream_and_a_whole_answer_share_one_entry(self, served):
        whole = served.chat(temperature=0, max_tokens=5)
        stream = served.chat(temperature=0, max_tokens=5, stream=True)
        assert (stream.headers["X-Cache"], streamed(stream)) == ("hit", content(whole))

    def test_what_does_not_shape_the_answer_does_not_matter(self, served):
        served.chat(temperature=0, max_tokens=5)
        parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
        same = {"model": "gpt-4", "messages": parts, "user": "me", "top_p": 0.5, "seed": 3, "max_completion_tokens": 5}
        assert served.chat(temperature=0, **same).headers["X-Cache"] == "hit"

    @pytest.mark.parametrize(
        "other", [{"max_tokens": 6}, {"n": 2}, {"stop": "x"}, {"presence_penalty": 1}, {"content": "Hell"}]
    )
    def test_what_shapes_the_answer_does(self, served, other):
        served.chat(temperature=0, max_tokens=5)
        assert served.chat(**{"temperature": 0, "max_tokens": 5} | other).headers["X-Cache"] == "miss"

    def test_a_model_that_was_loaded_anew_answers_anew(self, served):
        served.chat(temperature=0, max_tokens=5)
        served.registry.reload("org/fake")
        assert served.chat(temperature=0, max_tokens=5).headers["X-Cache"] == "miss"

    def test_no_cache_generates_anew_and_remembers(self, served):
        answers = [served.chat(temperature=0, headers={"Cache-Control": "No-Cache"}, max_tokens=5) for _ in range(2)]
        assert [answer.headers["X-Cache"] for answer in answers] == ["bypass", "bypass"]
        assert served.chat(temperature=0, max_tokens=5).headers["X-Cache"] == "hit"

    def test_no_store_leaves_nothing_behind(self, served):
        answer = served.chat(temperature=0, headers={"Cache-Control": "max-age=0, no-store"}, max_tokens=5)
        assert answer.headers["X-Cache"] == "bypass"
        assert served.chat(temperature=0, max_tokens=5).headers["X-Cache"] == "miss"

    def test_a_failed_answer_is_not_repeated(self, served):
        def fail():
            raise RuntimeError("out of luck")

        served.backend.on_forward = fail
        assert served.chat(temperature=0).status_code == 500
        served.backend.on_forward = lambda: None
        served.backend._busy = False
        assert served.chat(temperature=0, max_tokens=3).headers["X-Cache"] == "miss"


class TestSharedAnswers:
    def ask(self, served, **parameters):
        """A request from a thread of its own; its answer comes into the list."""
        answers = []
        thread = threading.Thread(target=lambda: answers.append(served.chat(temperature=0, max_tokens=5, **parameters)))
        thread.start()
        return thread, answers

    def test_identical_requests_at_once_are_one_generation(self, served):
        with served.held() as let_go:
            asked = [self.ask(served, stream=stream) for stream in (False, True, False)]
            wait_until(lambda: [flight.readers for flight in served.app._context.cache._flights.values()] == [3])
            let_go()
            for thread, _ in asked:
                thread.join(10)
        whole, stream, other = (answers[0] for _, answers in asked)
        assert sorted(each.headers["X-Cache"] for each in (whole, stream, other)) == ["coalesced", "coalesced", "miss"]
        assert content(whole) == content(other) == streamed(stream)
        assert served.status.statistics.requests == 1

    def test_it_goes_on_when_the_first_client_leaves(self, served):
        with served.held() as let_go:
            first = served.client.post(CHAT, json=chat_body(temperature=0, max_tokens=5, stream=True))
            second = served.client.post(CHAT, json=chat_body(temperature=0, max_tokens=5, stream=True))
            assert second.headers["X-Cache"] == "coalesced"
            first.close()
            let_go()
            assert len(streamed(second)) == 5


class TestStreams:
    def test_a_stream_begins_before_its_model_does(self, served):
        with served.held():
            response = served.client.post(CHAT, json=chat_body(stream=True))
            assert response.status_code == 200
            assert b'"role":"assistant"' in next(response.response)
            response.close()

    def test_the_last_chunk_and_done_come_in_one_write(self, serve):
        served = serve(say("ab"))
        response = served.client.post(CHAT, json=chat_body(stream=True, temperature=0))
        *_, last = response.response
        assert last.endswith(b"data: [DONE]\n\n")
        assert b'"finish_reason":"stop"' in last
        response.close()

    def test_proxies_are_told_to_pass_it_on_at_once(self, served):
        headers = served.chat(stream=True, max_tokens=1).headers
        assert headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert (headers["Cache-Control"], headers["X-Accel-Buffering"]) == ("no-cache", "no")
        assert "Content-Length" not in headers

    def test_usage_is_the_same_as_without_a_stream(self, served):
        usage = served.chat(temperature=0, max_tokens=4).json["usage"]
        *_, last = events(served.chat(temperature=0, max_tokens=4, stream=True, stream_options={"include_usage": True}))
        assert last["usage"] == usage


class TestLengths:
    def test_without_a_limit_an_answer_may_fill_the_context(self, served):
        usage = served.chat().json["usage"]
        assert usage["total_tokens"] == served.backend.context_length

    def test_a_prompt_that_leaves_no_room_is_too_long(self, served):
        overhead = served.chat("", max_tokens=1).json["usage"]["prompt_tokens"]
        content = "x" * (served.backend.context_length - overhead)
        error = served.chat(content).json["error"]
        assert error["code"] == "context_length_exceeded"
        assert "257 tokens (256 in the messages, 1 in the completion)" in error["message"]
        assert served.chat(content[:-1]).json["usage"]["completion_tokens"] == 1

    def test_an_empty_prompt_is_refused(self, serve):
        response = serve(template="").chat()
        assert (response.status_code, response.json["error"]["code"]) == (400, "chat_template_error")


def test_the_service_tier_is_answered_when_asked_for(served):
    assert served.chat(max_tokens=1, service_tier="auto").json["service_tier"] == "default"
    assert "service_tier" not in served.chat(max_tokens=1).json


def test_a_body_that_came_before_is_not_parsed_again(served):
    served.chat(max_tokens=1)
    hits = chat._parse_again.cache_info().hits
    served.chat(max_tokens=1)
    assert chat._parse_again.cache_info().hits == hits + 1
    assert chat.parse(json.dumps(chat_body()).encode()).prompts[0].key is None
