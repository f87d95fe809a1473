import pytest

from tests.api.conftest import MODEL, chat_body
from tests.fakes import BOS, END, START


def post(served, path, **body):
    return served.client.post(path, json={"model": MODEL} | body)


def test_text_to_tokens_and_back(served):
    text = "Grüße <start>"
    answer = post(served, "/tokenize", prompt=text).json
    assert answer == {"tokens": list(text.encode()), "count": len(text.encode()), "max_model_len": 256}
    assert post(served, "/detokenize", tokens=answer["tokens"]).json == {"prompt": text, "content": text}


def test_pieces_are_text_or_bytes(served):
    answer = post(served, "/tokenize", content="aü", with_pieces=True).json
    assert answer["pieces"] == ["a", [0xC3], [0xBC]]


def test_a_chats_prompt_and_its_tokens(served):
    body = chat_body("Hi")
    prompt = served.client.post("/apply-template", json=body).json["prompt"]
    assert prompt == "<start>user\nHi<end><start>assistant\n"
    tokens = served.client.post("/tokenize", json=body).json["tokens"]
    assert tokens == [START, *b"user\nHi", END, START, *b"assistant\n"]


def test_control_tokens_have_no_text(served):
    assert post(served, "/detokenize", tokens=[BOS, 65]).json["content"] == "A"
    assert post(served, "/detokenize", tokens=[]).json["content"] == ""


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [260]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/apply-template", {"messages": []}, "messages"),
    ],
)
def test_mistakes_are_named(served, path, body, param):
    response = post(served, path, **body)
    assert (response.status_code, response.json["error"]["param"]) == (400, param)
