import json
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmserve.engine.output_parser import CallArguments, CallBegin, Content, OutputParser, Reasoning

FUNCTIONS = ("get_weather", "add")
PARIS = '{"city": "Paris", "note": "a } \\" { \\\\"}'
CALL = f'{{"name": "get_weather", "arguments": {PARIS}}}'
SUM = '{"name": "add", "arguments": {"a": 1, "b": [2, {}]}}'


def parse(pieces, **options):
    """What the parts say together: content, reasoning and calls."""
    parser = OutputParser(FUNCTIONS, **options)
    parts = [part for piece in pieces for part in parser.push(piece)] + parser.flush()
    content = "".join(part.text for part in parts if isinstance(part, Content))
    reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    calls = []
    for part in parts:
        if isinstance(part, CallBegin):
            assert part.number == len(calls)
            calls.append([part.name, ""])
        elif isinstance(part, CallArguments):
            assert part.number == len(calls) - 1
            calls[-1][1] += part.text
        else:
            assert part.text
    return content, reasoning, [tuple(call) for call in calls]


ANSWERS = [
    # text, content, calls
    ("Hello.", "Hello.", []),
    ("", "", []),
    (" \n", " \n", []),
    (f"<tool_call>\n{CALL}\n</tool_call>", "", [("get_weather", PARIS)]),
    (f"Let me see.\n\n<tool_call>\n{CALL}\n</tool_call>\n", "Let me see.", [("get_weather", PARIS)]),
    (
        f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{SUM}</tool_call> Done.",
        "Done.",
        [("get_weather", PARIS), ("add", '{"a": 1, "b": [2, {}]}')],
    ),
    ('<tool_call>{"name":"add","arguments":{}}</tool_call>', "", [("add", "{}")]),
    ('<tool_call>{"name": "add"}</tool_call>', "", [("add", "{}")]),
    ('<tool_call>{"name": "add", "arguments": null}</tool_call>', "", [("add", "{}")]),
    ('<tool_call>{"arguments": {"a": 1}, "name": "add"}\n</tool_call>', "", [("add", '{"a": 1}')]),
    ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("add", '{"a": 1}')]),
    ('<tool_call>{"name": "add", "parameters": {"a": 1}}</tool_call>', "", [("add", '{"a": 1}')]),
    ('<tool_call>{"id": 7, "name": "add", "arguments": {}}</tool_call>', "", [("add", "{}")]),
    ('<tool_call>{"name": "add", "arguments": {"a": 1}, "id": "x}"}</tool_call>', "", [("add", '{"a": 1}')]),
    # models that forget an end
    ('<tool_call>{"name": "add", "arguments": {"a": 1}</tool_call>Yes', "Yes", [("add", '{"a": 1}')]),
    ('<tool_call>{"name": "add", "arguments": {"a": 1}}', "", [("add", '{"a": 1}')]),
    ('<tool_call>{"name": "add", "arguments": {"a": 1', "", [("add", '{"a": 1')]),
    ('<tool_call>{"name": "add", "arguments": {"a": "\\', "", [("add", '{"a": "\\')]),
    # what only resembles a call
    ("a <b> <tool <tool_call", "a <b> <tool <tool_call", []),
    ("The <tool_call> tag", "The <tool_call> tag", []),
    ("<tool_call>\n{not JSON}\n</tool_call>", "<tool_call>\n{not JSON}\n</tool_call>", []),
    (f"<tool_call>{CALL.replace('get', 'set')}", f"<tool_call>{CALL.replace('get', 'set')}", []),
    ('<tool_call>{"name": "add", "argum', '<tool_call>{"name": "add", "argum', []),
    ('<tool_call>{"name": "add", "arguments": [1]}', '<tool_call>{"name": "add", "arguments": [1]}', []),
    (f"<tool_call> x <tool_call>{SUM}", "<tool_call> x", [("add", '{"a": 1, "b": [2, {}]}')]),
    (SUM, "", [("add", '{"a": 1, "b": [2, {}]}')]),
    (f"Like {SUM}", f"Like {SUM}", []),
    (f"[TOOL_CALLS][{CALL}, {SUM}]", "", [("get_weather", PARIS), ("add", '{"a": 1, "b": [2, {}]}')]),
    ('[TOOL_CALLS] [{"name": "add", "arguments": {}, "id": "123456789"}]', "", [("add", "{}")]),
    (f"[TOOL_CALLS]get_weather[ARGS]{PARIS}[TOOL_CALLS]add{{}}", "", [("get_weather", PARIS), ("add", "{}")]),
    ("Yes.[TOOL_CALLS]add[CALL_ID]x1[ARGS]{}", "Yes.", [("add", "{}")]),
    ("[TOOL_CALLS]sub[ARGS]{} [1]", "[TOOL_CALLS]sub[ARGS]{} [1]", []),
    ("[TOOL] [1, 2]", "[TOOL] [1, 2]", []),
    ('{"name": "add", "parameters": {"a": 1}}', "", [("add", '{"a": 1}')]),
    ('\n\n{"name": "add", "parameters": {"a": 1}}', "", [("add", '{"a": 1}')]),
    ('<|python_tag|>{"name": "add", "parameters": {"a": 1}}', "", [("add", '{"a": 1}')]),
    ('{"type": "function", "name": "add", "parameters": {"a": 1}}', "", [("add", '{"a": 1}')]),
    ('{"function": "add", "parameters": {"a": 1}}', "", [("add", '{"a": 1}')]),
    (
        '{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {}}\n{"name": "add", "parameters": {}}',
        "",
        [("add", '{"a": 1}'), ("add", "{}"), ("add", "{}")],
    ),
    ('{"name": "Ann", "age": 3}', '{"name": "Ann", "age": 3}', []),
    ('{"age": 3, "name": "add"}', '{"age": 3, "name": "add"}', []),
    ('So: {"name": "add", "parameters": {}}', 'So: {"name": "add", "parameters": {}}', []),
    ('{"name": "add", "parameters": {}} and that is it', "and that is it", [("add", "{}")]),
]


@pytest.mark.parametrize(("text", "content", "calls"), ANSWERS)
def test_what_an_answer_means(text, content, calls):
    assert parse([text]) == (content, "", calls)


@pytest.mark.parametrize(("text", "content", "calls"), ANSWERS)
def test_character_by_character_it_means_the_same(text, content, calls):
    assert parse(text) == (content, "", calls)


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", "Yes.", "Hm."),
        ("\n<think>Hm.</think>Yes.", "Yes.", "Hm."),
        ("<think>\n\n</think>\n\nYes.", "Yes.", ""),
        ("<think>Hm. <b> </thi", "", "Hm. <b> </thi"),
        ("<thinking> hard", "<thinking> hard", ""),
        ("Yes. <think>no</think>", "Yes. <think>no</think>", ""),
        ("<think>a</think>b<think>c", "b<think>c", "a"),
        ("", "", ""),
    ],
)
def test_reasoning(text, content, reasoning):
    for pieces in ([text], text):
        assert parse(pieces, reasoning=True) == (content, reasoning, [])


def test_reasoning_and_then_a_call():
    text = f"<think>\nThe weather?\n</think>\n\n<tool_call>\n{CALL}\n</tool_call>"
    assert parse(text, reasoning=True) == ("", "The weather?", [("get_weather", PARIS)])


def test_a_call_within_reasoning_is_none():
    text = f"<think><tool_call>{CALL}</tool_call></think>No."
    assert parse([text], reasoning=True) == ("No.", f"<tool_call>{CALL}</tool_call>", [])


def test_calls_beyond_the_most_are_left_out():
    text = f"<tool_call>{CALL}</tool_call><tool_call>{SUM}</tool_call>"
    assert parse(text, max_calls=1) == ("", "", [("get_weather", PARIS)])


@pytest.mark.parametrize(
    "text",
    [
        f"{CALL}\n</tool_call>\n<tool_call>\n{SUM}\n</tool_call>",
        f"[{CALL}, {SUM}]",
        f"{CALL}; {SUM}".replace("arguments", "parameters"),
    ],
)
def test_a_forced_answer_lacks_the_first_opener_which_the_prompt_has(text):
    expected = ("", "", [("get_weather", PARIS), ("add", '{"a": 1, "b": [2, {}]}')])
    assert parse([text], forced=True) == parse(text, forced=True) == expected


def test_without_functions_there_are_no_calls():
    parser = OutputParser(())
    assert parser.push(f"<tool_call>{CALL}") == [Content(f"<tool_call>{CALL}")]


def test_arguments_come_in_pieces_as_they_are_written():
    parser = OutputParser(FUNCTIONS)
    head, _, rest = CALL.partition(PARIS)
    assert parser.push("Well <tool_call>\n" + head) == [Content("Well")]
    assert parser.push('{"city": "Pa') == [CallBegin(0, "get_weather"), CallArguments(0, '{"city": "Pa')]
    assert parser.push('ris"}') == [CallArguments(0, 'ris"}')]
    assert parser.push(rest + "\n</tool_call>") == []


def test_text_is_held_back_no_longer_than_it_may_be_a_marker():
    parser = OutputParser(FUNCTIONS)
    assert parser.push("a < b") == [Content("a < b")]
    assert parser.push(" <tool") == []
    assert parser.push("box") == [Content(" <toolbox")]
    assert OutputParser(FUNCTIONS).push('{"city": "') == [Content('{"city": "')]


@pytest.mark.parametrize("text", ["<tool_call>", ' <tool_call>\n{"name": "ad', '<tool_call>{"arguments": {"a": 1}, "na'])
def test_of_an_answer_that_is_cut_the_beginning_of_a_call_is_no_content(text):
    for cut, parts in ((True, []), (False, [Content(text)])):
        parser = OutputParser(FUNCTIONS)
        assert parser.push(text) == []
        flushed = parser.flush(cut=cut)
        assert [Content("".join(part.text for part in flushed))] * bool(flushed) == parts


@pytest.mark.parametrize("end", ["</tool_ca", "}\n</tool_call", "}"])
def test_a_cut_end_of_a_call_is_no_content(end):
    assert parse(f'<tool_call>{{"name": "add", "arguments": {{}}{end}') == ("", "", [("add", "{}")])


MARKERS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<think>", "</think>", "<tool", "}}"]
MEMBERS = ['"name": ', '"add"', '"arguments": ', '"parameters": ', '{"name": "add", "arguments": {', "add[ARGS]{", CALL, SUM]
FRAGMENTS = st.sampled_from([*'{}[]",: \\\nax1;', *MARKERS, *MEMBERS])


@settings(deadline=None)
@given(
    st.lists(FRAGMENTS, max_size=14).map("".join),
    st.lists(st.integers(0, 400)),
    st.booleans(),
)
@example('<tool_call>{"arguments": {"a": "\\\\"}, "name": "add"}', list(range(60)), False)
def test_however_it_is_cut_into_pieces_a_text_means_the_same(text, cuts, reasoning):
    indices = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[begin:end] for begin, end in pairwise(indices)]
    whole = parse([text], reasoning=reasoning)
    assert parse(pieces, reasoning=reasoning) == whole
    assert parse(text, reasoning=reasoning) == whole


@settings(deadline=None)
@given(st.text(alphabet="ab<{\n [T"))
def test_text_without_a_call_comes_out_as_it_is(text):
    assert parse(text) == (text, "", [])


@settings(deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda each: st.dictionaries(st.text(), each)))
def test_arguments_come_out_as_they_are(value):
    arguments = json.dumps({"value": value})
    text = f'<tool_call>{{"name": "add", "arguments": {arguments}}}</tool_call>'
    assert parse(text) == ("", "", [("add", arguments)])
