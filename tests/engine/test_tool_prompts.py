"""What is found out about templates, and what prompts come of it. The templates are written as those of the families are."""

import pytest

from llmserve.engine.chat_template import ChatTemplate, Control, Text
from llmserve.engine.tool_formats import HERMES, LLAMA_3, MISTRAL, Function
from llmserve.engine.tool_prompts import ToolSupport, adapt
from tests.tiny_models import CHATML

HERMES_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "For each call write <tool_call>\n{'name': ..., 'arguments': ...}\n</tool_call><|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'tool' %}<tool_response>\n{{ m.content }}\n</tool_response>{% else %}{{ m.content }}{% endif %}"
    '{% for call in m.tool_calls or [] %}\n<tool_call>\n{"name": "{{ call.function.name }}", "arguments": '
    "{{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id | length != 9 %}{{ raise_exception('ids of length 9!') }}{% endif %}[TOOL_RESULTS]{{ m.content }}"
    "{% elif m.tool_calls %}[TOOL_CALLS]{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
LLAMA_TEMPLATE = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}<|eot_id|>{% endfor %}"
    '{% if tools %}Respond in the format {"name": function name, "parameters": dictionary}.{{ tools | tojson }}{% endif %}'
)
CODER_TEMPLATE = HERMES_TEMPLATE.replace("{'name': ..., 'arguments': ...}", "<function=NAME>")

ADD = Function("add", "Add numbers.", {"type": "object", "properties": {"a": {"type": "integer"}}})
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
HISTORY = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL | {"id": "call_2"}]},
    {"role": "tool", "content": "two", "tool_call_id": "call_1"},
    {"role": "tool", "content": "2", "tool_call_id": "call_2"},
]


def prompt(source, messages, functions=()):
    template = ChatTemplate(source)
    messages, variables = adapt(messages, functions, template.tools)
    return "".join(segment.text for segment in template.render(messages, **variables))


@pytest.mark.parametrize(
    ("source", "support"),
    [
        (None, ToolSupport()),
        (CHATML, ToolSupport()),
        (HERMES_TEMPLATE, ToolSupport(HERMES, definitions=True, history=True)),
        (MISTRAL_TEMPLATE, ToolSupport(MISTRAL, definitions=True, history=True, short_ids=True)),
        (LLAMA_TEMPLATE, ToolSupport(LLAMA_3, definitions=True, history=True, one_call=True)),
        (CODER_TEMPLATE, ToolSupport(HERMES, definitions=False, history=True)),
        ("{{ raise_exception('no') }} <tool_call>", ToolSupport()),
        ("{% if tools %}tools{% endif %}[TOOL_CALLS]", ToolSupport(MISTRAL)),
    ],
)
def test_what_a_template_can_do_is_found_out_by_rendering(source, support):
    assert ChatTemplate(source).tools == support


def test_a_template_that_can_is_given_the_tools():
    text = prompt(HERMES_TEMPLATE, HISTORY, [ADD])
    assert '{"type": "function", "function": {"name": "add", "description": "Add numbers."' in text
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in text
    assert "<tool_response>\ntwo\n</tool_response>" in text
    assert "You can call functions" not in text


def test_for_one_that_cannot_they_are_described_in_the_system_message():
    for messages in (HISTORY, [{"role": "system", "content": "Be brief."}, *HISTORY]):
        text = prompt(CHATML, messages, [ADD])
        assert text.count("<|im_start|>system") == 1
        assert '{"name": "add", "description": "Add numbers.", "parameters": {"type": "object"' in text
        assert ("Be brief.\n\nYou can call" in text) == (len(messages) > len(HISTORY))


def test_calls_and_results_are_words_for_one_that_knows_neither():
    text = prompt(CHATML, HISTORY)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert f"<|im_start|>assistant\n{call}\n{call}<|im_end|>" in text
    results = "<tool_response>\ntwo\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    assert f"<|im_start|>user\n{results}<|im_end|>" in text
    assert "You can call functions" not in text


def test_ids_are_made_short_for_a_template_that_wants_nine_characters():
    assert "[TOOL_RESULTS]two[TOOL_RESULTS]2" in prompt(MISTRAL_TEMPLATE, HISTORY, [ADD])


def test_the_messages_that_came_in_are_left_as_they_are():
    before = repr(HISTORY)
    for source in (CHATML, MISTRAL_TEMPLATE):
        prompt(source, HISTORY, [ADD])
    assert repr(HISTORY) == before


def test_a_prompt_goes_on_with_control_tokens_or_text():
    template = ChatTemplate(CHATML, control_texts=["[TOOL_CALLS]"])
    assert template.extend([Text("a")], "<tool_call>\n") == (Text("a<tool_call>\n"),)
    assert template.extend([Text("a")], "[TOOL_CALLS]") == (Text("a"), Control("[TOOL_CALLS]"))
    assert template.extend([Text("a")], "") == (Text("a"),)
