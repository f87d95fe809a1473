"""The `llm` command line, by its extra-openai-models.yaml."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs.conftest import QUESTION
from tests.programs.weather import Weather


@pytest.fixture
def llm(documented, tmp_path):
    """What the command prints."""
    (tmp_path / "extra-openai-models.yaml").write_text(documented("llm"))
    environ = {**os.environ, "LLM_USER_PATH": str(tmp_path)}

    def llm(*arguments):
        command = [Path(sys.executable).with_name("llm"), *arguments]
        result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return llm


def test_an_answer_and_its_stream(llm):
    options = ["-m", "smol", "-o", "temperature", "0", "-o", "max_tokens", "12"]
    whole = llm(*options, "--no-stream", QUESTION)
    assert whole.strip()
    assert llm(*options, QUESTION) == whole


def test_an_answer_by_a_schema(llm):
    schema = json.dumps(Weather.model_json_schema())
    Weather.model_validate_json(
        llm("-m", "smol", "-o", "temperature", "0", "-o", "max_tokens", "100", "--schema", schema, QUESTION)
    )
