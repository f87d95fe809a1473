import json

from hypothesis import given
from hypothesis import strategies as st

from llmserve.api.render import ChatWriter, ChunkStream, Tally, chat_choice, gather
from llmserve.engine.generation import ChoiceEnd, Delta, FinishReason, GenerationEnd

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 5, "model": "m"}
END = GenerationEnd(num_prompt_tokens=7, num_cached_tokens=4, queue_time=0, prefill_time=0, decode_time=0)
TWO_CHOICES = [
    Delta(0, "Hel"),
    Delta(0, "lo"),
    ChoiceEnd(0, FinishReason.STOP, 3),
    Delta(1, "Hi"),
    ChoiceEnd(1, FinishReason.LENGTH, 2),
    END,
]
USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 4}}


def completion(n, events, tally):
    return {"choices": [chat_choice(choice) for choice in gather(n, events, tally)], "usage": tally.usage()}


def chunks_of(events, n=1, include_usage=False, cuts=()):
    """All chunks, the events arriving in batches cut at the given places."""
    stream = ChunkStream(HEAD, n, include_usage, ChatWriter())
    chunks = stream.begin()
    for begin, end in zip([0, *cuts], [*cuts, len(events)], strict=True):
        chunks += stream.add(events[begin:end])
    assert stream.ended
    return chunks


def test_a_completion_has_every_key_that_clients_need():
    assert completion(2, TWO_CHOICES, Tally()) == {
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            },
            {
                "index": 1,
                "message": {"role": "assistant", "content": "Hi", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            },
        ],
        "usage": USAGE,
    }


def test_an_answer_without_a_word_is_empty_text():
    (choice,) = completion(1, [ChoiceEnd(0, FinishReason.STOP, 1), END], Tally())["choices"]
    assert choice["message"]["content"] == ""


def test_the_roles_of_all_choices_come_first_and_in_order():
    roles = chunks_of(TWO_CHOICES, n=2)[:2]
    assert [chunk["choices"][0]["index"] for chunk in roles] == [0, 1]
    assert [chunk["choices"][0]["delta"] for chunk in roles] == [{"role": "assistant", "content": "", "refusal": None}] * 2


def test_chunks_carry_one_head_and_a_finish_reason_at_the_end_of_each_choice():
    chunks = chunks_of(TWO_CHOICES, n=2)
    assert all(chunk | HEAD == chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [(choice["index"], choice["delta"].get("content"), choice["finish_reason"]) for choice in choices[2:]] == [
        (0, "Hel", None),
        (0, "lo", None),
        (0, None, "stop"),
        (1, "Hi", None),
        (1, None, "length"),
    ]
    assert choices[4]["delta"] == {}


def test_usage_comes_last_when_asked_for_and_is_null_before():
    *chunks, last = chunks_of(TWO_CHOICES, n=2, include_usage=True)
    assert [chunk["usage"] for chunk in chunks] == [None] * 7
    assert (last["choices"], last["usage"]) == ([], USAGE)


def test_usage_is_not_there_unasked():
    chunks = chunks_of(TWO_CHOICES, n=2)
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


def test_the_last_finish_reason_waits_for_the_end_to_share_its_write():
    stream = ChunkStream(HEAD, 1, include_usage=False, writer=ChatWriter())
    assert len(stream.add([Delta(0, "x")])) == 1
    assert stream.add([Delta(0, "y"), ChoiceEnd(0, FinishReason.STOP, 3)]) == []
    assert not stream.ended
    held = stream.add([END])
    assert [chunk["choices"][0]["finish_reason"] for chunk in held] == [None, "stop"]


@given(st.lists(st.integers(0, len(TWO_CHOICES)), unique=True).map(sorted))
def test_the_chunks_do_not_depend_on_how_the_events_arrive(cuts):
    assert chunks_of(TWO_CHOICES, 2, True, cuts) == chunks_of(TWO_CHOICES, 2, True)


def test_stream_and_completion_agree():
    streamed = {0: "", 1: ""}
    for chunk in chunks_of(TWO_CHOICES, n=2):
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
    whole = completion(2, TWO_CHOICES, Tally())
    assert [choice["message"]["content"] for choice in whole["choices"]] == list(streamed.values())
    json.dumps(whole)
