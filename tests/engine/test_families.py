"""The families' conventions: what their templates make of tools, calls and results, and what their models' own words become."""

import json

import pytest

from llmserve.engine import tool_formats
from llmserve.engine.chat_template import ChatTemplate
from llmserve.engine.output_parser import CallArguments, CallBegin, Content, OutputParser
from llmserve.engine.tool_formats import Function
from llmserve.engine.tool_prompts import ToolSupport, adapt
from tests import families

ADD = Function("add", "Add.", {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
SUPPORT = {
    "QWEN": ToolSupport(tool_formats.HERMES, definitions=True, history=True),
    "HERMES": ToolSupport(tool_formats.HERMES, definitions=True, history=True),
    "LLAMA": ToolSupport(tool_formats.LLAMA_3, definitions=True, history=True, one_call=True),
    "MISTRAL": ToolSupport(tool_formats.MISTRAL, definitions=True, history=True, short_ids=True),
}


def call(number):
    return {"id": f"call_{number}", "type": "function", "function": {"name": "add", "arguments": {"a": number}}}


def result(number):
    return {"role": "tool", "content": f"sum {number}", "tool_call_id": f"call_{number}"}


QUESTION = {"role": "user", "content": "Add these."}
CALLS = {"role": "assistant", "content": "", "tool_calls": [call(1), call(2)]}
HISTORY = [QUESTION, CALLS, result(1), result(2)]


def prompt(family, messages, functions=(ADD,)):
    template = ChatTemplate(getattr(families, family), special={"bos_token": "<s>", "eos_token": "</s>"})
    adapted, variables = adapt(messages, functions, template.tools)
    return "".join(segment.text for segment in template.render(adapted, **variables))


@pytest.mark.parametrize("family", SUPPORT)
def test_what_its_template_can_do_is_found_out(family):
    assert ChatTemplate(getattr(families, family), special={"bos_token": "<s>", "eos_token": "</s>"}).tools == SUPPORT[family]


@pytest.mark.parametrize("family", SUPPORT)
def test_tools_are_shown_by_the_template_itself(family):
    text = prompt(family, [QUESTION])
    assert "You can call functions" not in text
    assert json.dumps(ADD.definition()) in text or json.dumps(ADD.definition(), indent=4) in text
    assert ADD.name not in prompt(family, [QUESTION], ())


@pytest.mark.parametrize(
    ("family", "shown"),
    [
        (
            "QWEN",
            "<|im_start|>user\nAdd these.<|im_end|>\n<|im_start|>assistant"
            '\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
            '\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>\n'
            "<|im_start|>user\n<tool_response>\nsum 1\n</tool_response>\n<tool_response>\nsum 2\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            "HERMES",
            "<|im_start|>user\nAdd these.<|im_end|>\n<|im_start|>assistant"
            '\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
            '\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>\n'
            "<|im_start|>tool\n<tool_response>\nsum 1\n</tool_response>\n<tool_response>\nsum 2\n</tool_response><|im_end|>"
            "<|im_start|>assistant\n",
        ),
        (
            "LLAMA",
            "Add these.<|eot_id|>"
            '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "add", "parameters": {"a": 1}}<|eot_id|>'
            '<|start_header_id|>ipython<|end_header_id|>\n\n"sum 1"<|eot_id|>'
            '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "add", "parameters": {"a": 2}}<|eot_id|>'
            '<|start_header_id|>ipython<|end_header_id|>\n\n"sum 2"<|eot_id|>'
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ],
)
def test_calls_and_results_of_the_history_are_in_its_own_form(family, shown):
    assert prompt(family, HISTORY).endswith(shown)


def test_mistrals_calls_have_ids_of_nine_letters_that_their_results_repeat():
    text = prompt("MISTRAL", HISTORY)
    calls, results = text.partition("[TOOL_CALLS] ")[2].split("</s>")
    ids = [each["id"] for each in json.loads(calls)]
    assert [{**each, "id": ""} for each in json.loads(calls)] == [
        {"name": "add", "arguments": {"a": number}, "id": ""} for number in (1, 2)
    ]
    assert [len(each) for each in ids] == [9, 9] and len(set(ids)) == 2
    assert results == "".join(
        f'[TOOL_RESULTS] {{"content": sum {number}, "call_id": "{each}"}}[/TOOL_RESULTS]'
        for number, each in zip((1, 2), ids, strict=True)
    )


def test_where_one_call_goes_into_a_message_each_has_its_result_behind_it():
    support = SUPPORT["LLAMA"]
    stray = result(3)
    messages, _ = adapt([QUESTION, CALLS | {"content": "Well."}, result(2), stray, result(1), QUESTION], [ADD], support)
    first, second = ({**CALLS, "content": text, "tool_calls": [call(number)]} for text, number in (("Well.", 1), ("", 2)))
    assert messages == [QUESTION, first, result(1), second, result(2), stray, QUESTION]


ONE = [CallBegin(0, "add"), CallArguments(0, '{"a": 1}')]
TWO = [*ONE, CallBegin(1, "add"), CallArguments(1, '{"a": 2}')]
SAID = {
    "QWEN": ('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', ONE),
    "QWEN, twice": (
        'I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
        '\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>',
        [Content("I add."), *TWO],
    ),
    "HERMES, arguments first": ('<tool_call>\n{"arguments": {"a": 1}, "name": "add"}\n</tool_call>\n', ONE),
    "LLAMA": ('{"name": "add", "parameters": {"a": 1}}', ONE),
    "LLAMA, typed": ('{"type": "function", "name": "add", "parameters": {"a": 1}}', ONE),
    "LLAMA, with a tag": ('<|python_tag|>{"name": "add", "parameters": {"a": 1}}', ONE),
    "LLAMA, twice": ('{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {"a": 2}}', TWO),
    "MISTRAL": ('[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]', ONE),
    "MISTRAL, twice": (
        '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {"a": 2}, "id": "abcdefghi"}]',
        TWO,
    ),
    "MISTRAL, later": ('[TOOL_CALLS]add[ARGS]{"a": 1}', ONE),
    "MISTRAL, later, twice": ('[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{"a": 1}[TOOL_CALLS]add[ARGS]{"a": 2}', TWO),
}


def parts(text, size):
    """What a text becomes that comes in pieces of this size, with the pieces of one part put together."""
    parser = OutputParser(["add"])
    joined = []
    for part in [each for i in range(0, len(text), size) for each in parser.push(text[i : i + size])] + parser.flush():
        if joined and type(joined[-1]) is type(part) and isinstance(part, Content | CallArguments):
            joined[-1] = part._replace(text=joined[-1].text + part.text)
        else:
            joined.append(part)
    return joined


@pytest.mark.parametrize("name", SAID)
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_what_its_models_write_is_read_as_calls_and_no_markup_is_left(name, size):
    text, expected = SAID[name]
    assert parts(text, size) == expected
