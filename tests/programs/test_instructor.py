"""instructor: answers as Pydantic models."""

import pytest

from tests.programs.conftest import QUESTION
from tests.programs.weather import Weather

MESSAGES = [{"role": "user", "content": f"{QUESTION} Use celsius."}]


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_an_answer_is_the_model_that_was_asked_for(documented, mode):
    import instructor

    client = eval(documented("instructor"), {"instructor": instructor, "mode": instructor.Mode[mode]})
    answer = client.create(response_model=Weather, messages=MESSAGES, temperature=0, max_tokens=100, max_retries=0)
    assert isinstance(answer, Weather)


def test_an_answer_comes_in_parts(documented):
    import instructor

    client = eval(documented("instructor"), {"instructor": instructor, "mode": instructor.Mode.TOOLS})
    *_, last = client.create_partial(response_model=Weather, messages=MESSAGES, temperature=0, max_tokens=100, max_retries=0)
    Weather.model_validate(last.model_dump())
