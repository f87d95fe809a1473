"""instructor: answers as Pydantic models."""

import pytest

from tests.programs.conftest import QUESTION
from tests.programs.weather import Weather

ASKED = {
    "messages": [{"role": "user", "content": f"{QUESTION} Use celsius."}],
    "response_model": Weather,
    "temperature": 0,
    "max_tokens": 100,
    "max_retries": 0,
}


@pytest.fixture(params=["TOOLS", "JSON_SCHEMA"])
def client(request, documented):
    import instructor

    line = documented("instructor").removesuffix(")") + f", mode=instructor.Mode.{request.param})"
    return eval(line, {"instructor": instructor})


def test_an_answer_is_the_model_that_was_asked_for(client):
    assert isinstance(client.create(**ASKED), Weather)


def test_an_answer_comes_in_parts(client):
    *_, last = client.create_partial(**ASKED)
    Weather.model_validate(last.model_dump())
