"""Masks of grammars over the scores of a byte vocabulary, and answers of both engines within them."""

import json
import threading

import numpy as np
import pytest

from llmserve.engine.constraint import Constraints
from llmserve.engine.generation import ChoiceEnd, Delta, FinishReason, GenerationParams, Grammar, SamplingParams
from llmserve.engine.grammar import check
from llmserve.engine.tokenizer import text_by_text
from llmserve.errors import InvalidGrammar
from tests.fakes import EOS, VOCAB_SIZE, FakeBackend, FakeBatchBackend, byte_tokenizer, make_engine

SCORES = np.arange(VOCAB_SIZE, dtype=np.float32)


def schema(**keywords):
    return Grammar("json_schema", json.dumps(keywords))


AB = schema(type="object", properties={"a": {"type": "integer"}}, required=["a"], additionalProperties=False)


def after(text, grammar):
    """The constraint when `text` has been written; every byte of it must have been allowed."""
    constraint = Constraints(byte_tokenizer()).get(grammar).copy()
    for value in text.encode():
        assert value in allowed(constraint), f"{chr(value)!r} is not allowed in {text!r}"
        constraint.advance(value)
    return constraint


def allowed(constraint):
    return set(np.flatnonzero(np.isfinite(constraint.apply(SCORES))))


def test_scores_are_masked_in_a_copy():
    constraint = after("", Grammar("regex", "[ab]c"))
    scores = constraint.apply(SCORES)
    assert (scores[97], scores[98], scores[99]) == (97, 98, -np.inf)
    assert scores.dtype == np.float32
    assert np.isfinite(SCORES).all()


@pytest.mark.parametrize(
    ("grammar", "text", "expected"),
    [
        (Grammar("regex", "[ab]c"), "a", {ord("c")}),
        (Grammar("regex", "ab?"), "a", {ord("b"), EOS}),
        (Grammar("lark", 'start: "x" | "yz"'), "", {ord("x"), ord("y")}),
        (schema(enum=["ä", "ö"]), '"', {"ä".encode()[0]}),
        (AB, '{"a":', {*b" \n\t-0123456789"}),
    ],
)
def test_only_what_the_grammar_allows_may_follow(grammar, text, expected):
    assert allowed(after(text, grammar)) == expected


def test_one_token_is_asked_about_and_no_mask_is_made():
    constraint = after("a", Grammar("regex", "a[a-z]+!"))
    constraint.advance(ord("b"))
    assert [constraint.allows(token_id) for token_id in (*b"z!A", EOS)] == [True, True, False, False]
    assert constraint._bits is None


def test_a_question_is_answered_as_the_mask_says_where_text_is_spelt_in_one_way_only():
    tokenizer = byte_tokenizer()
    tokenizer._pieces[200] = b"ell"
    tokenizer.tokenize = text_by_text(lambda data: [ord("h"), 200, ord("o")] if data == b"hello" else list(data), list)
    constraint = Constraints(tokenizer).get(Grammar("regex", "[0-9]hello")).copy()
    for token_id in (ord("7"), ord("h"), 200, ord("o")):
        assert constraint.copy().allows(token_id)
        assert allowed(constraint) == {token_id} | ({*b"0123456789"} if token_id == ord("7") else set())
        assert not constraint.allows(ord("e"))
        constraint.advance(token_id)
    assert constraint.complete


def test_the_end_is_known_when_nothing_may_follow():
    assert not after('{"a": 1', AB).complete
    assert after('{"a": 1}', AB).complete


def test_white_space_in_json_is_bounded():
    constraint = after("{" + " " * 20, AB)
    assert allowed(constraint) == {ord('"')}


def test_copies_advance_alone():
    pristine = Constraints(byte_tokenizer()).get(Grammar("regex", "ab"))
    copy = pristine.copy()
    copy.advance(ord("a"))
    assert (allowed(pristine), allowed(copy)) == ({ord("a")}, {ord("b")})


def test_a_grammar_is_compiled_once():
    constraints = Constraints(byte_tokenizer())
    assert constraints.get(AB) is constraints.get(AB)


@pytest.mark.parametrize(
    ("grammar", "path", "reason"),
    [
        (schema(type="array", uniqueItems=True), "", 'Unimplemented keys: ["uniqueItems"]'),
        (schema(properties={"a": {"anyOf": [{}, {"items": {"not": {}}}]}}), ".properties.a.anyOf[1].items", "Unimplemented"),
        (schema(**{"$ref": "#/$defs/x", "$defs": {"x": {"type": "wrong"}}}), ".$defs.x", "Invalid type: wrong"),
        (schema(items={"type": "string", "format": "date", "not": {}}), ".items", 'Unimplemented keys: ["not"]'),
        (schema(type="integer", minimum=3, maximum=1), "", "minimum (3) is greater than maximum (1)"),
        (schema(**{"$ref": "#/$defs/x"}), "", "does not exist"),
        (Grammar("regex", "("), "", "unclosed group"),
        (Grammar("lark", "start: missing"), "", 'unknown name: "missing"'),
        (Grammar("lark", "start: <|im_start|>"), "", "more than can be enforced"),
    ],
)
def test_what_cannot_be_enforced_is_refused_with_its_place(grammar, path, reason):
    with pytest.raises(InvalidGrammar) as caught:
        Constraints(byte_tokenizer()).get(grammar)
    assert caught.value.path == path
    assert reason in caught.value.message
    assert "<" not in caught.value.message


def test_a_check_needs_no_tokenizer():
    check(AB)
    with pytest.raises(InvalidGrammar):
        check(Grammar("regex", "("))


def test_what_the_vocabulary_cannot_write_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer._pieces[ord("x")] = b""
    with pytest.raises(InvalidGrammar, match="Nothing that this model can write"):
        Constraints(tokenizer).get(Grammar("regex", "x"))


@pytest.mark.parametrize("text", ["hello", "hé", '{"a":1}'])
def test_a_vocabulary_whose_tokenizer_puts_a_space_in_front_can_write_what_has_no_choice(text):
    tokenizer = byte_tokenizer()
    tokenizer.tokenize = text_by_text(lambda data: [ord(" "), *data], list)
    constraint = Constraints(tokenizer).get(Grammar("lark", f"start: {json.dumps(text, ensure_ascii=False)}")).copy()
    for value in text.encode():
        assert allowed(constraint) == {value}
        constraint.advance(value)
    assert constraint.complete


ENGINES = {"slots": lambda: [FakeBackend(), FakeBackend()], "batch": lambda: FakeBatchBackend(num_sequences=2)}


@pytest.fixture(params=ENGINES)
def engine(request):
    engine = make_engine(ENGINES[request.param](), template=None)
    yield engine
    engine.close()


def run(engine, grammar, *, max_tokens=50, **options):
    sampling = SamplingParams(temperature=options.pop("temperature", 1.5), seed=7)
    events = list(engine.submit([1, 2], GenerationParams(max_tokens, sampling=sampling, grammar=grammar, **options)).events(10))
    texts = ["".join(e.text for e in events if isinstance(e, Delta) and e.choice == i) for i in range(options.get("n", 1))]
    return texts, [event.finish_reason for event in events if isinstance(event, ChoiceEnd)]


def test_answers_end_with_their_grammar(engine):
    texts, reasons = run(engine, AB, n=3)
    assert [set(json.loads(text)) for text in texts] == [{"a"}] * 3
    assert reasons == [FinishReason.STOP] * 3


def test_a_cut_answer_says_so(engine):
    texts, reasons = run(engine, Grammar("regex", "a{9}"), max_tokens=4)
    assert (texts, reasons) == (["aaaa"], [FinishReason.LENGTH])
    assert run(engine, Grammar("regex", "a{4}"), max_tokens=4) == (["aaaa"], [FinishReason.STOP])


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize("rest", ["x", "[xy]"])
def test_an_answer_is_cut_where_nothing_that_the_vocabulary_can_write_goes_on(engine, rest, temperature):
    for letter in b"xy":
        engine.tokenizer._pieces[letter] = b""
    texts, reasons = run(engine, Grammar("regex", f"[ab]{{3}}{rest}"), temperature=temperature, stop=("a!", "b!"), logprobs=0)
    assert (len(texts[0]), reasons) == (3, [FinishReason.LENGTH])


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_ends_are_kept_off_within_a_grammar_while_anything_else_may_follow(engine, temperature):
    assert run(engine, Grammar("regex", "a*"), max_tokens=9, temperature=temperature, min_tokens=9)[0] == ["a" * 9]
    assert run(engine, Grammar("regex", "a*"), max_tokens=9, temperature=temperature, ignore_eos=True)[0] == ["a" * 9]
    texts, reasons = run(engine, Grammar("lark", 'start: "aa" END?\nEND: /b/'), temperature=temperature, min_tokens=9)
    assert (texts, reasons) == (["aab"], [FinishReason.STOP])


def test_stop_strings_end_a_grammar_early(engine):
    assert run(engine, Grammar("regex", "abcdef"), stop=("cd",)) == (["ab"], [FinishReason.STOP])


def test_a_bad_grammar_leaves_the_queue_as_it_was(engine):
    with pytest.raises(InvalidGrammar):
        engine.submit([1], GenerationParams(5, grammar=Grammar("regex", "(")))
    assert engine.load.running == engine.load.waiting == 0


def test_threads_share_a_grammar(engine):
    results = []
    grammar = schema(
        type="object", properties={"name": {"enum": ["one", "two"]}}, required=["name"], additionalProperties=False
    )
    threads = [threading.Thread(target=lambda: results.append(run(engine, grammar, n=2))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(results) == 8
    assert all(json.loads(text)["name"] in ("one", "two") for texts, _ in results for text in texts)
