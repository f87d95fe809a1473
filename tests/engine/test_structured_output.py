"""Three hundred answers of the real model at temperature 1.5, over thirty schemas, on each library: what ends is valid, by an
independent validator, and what is cut is the beginning of something valid, which is shown by writing the rest.
"""

import json
import random
from dataclasses import replace
from datetime import datetime

import jsonschema
import numpy as np
import pytest

from llmserve.config import DEFAULT_MODEL, load
from llmserve.engine.constraint import Constraints
from llmserve.engine.generation import ChoiceEnd, Delta, FinishReason, GenerationParams, Grammar, SamplingParams
from llmserve.engine.json_schema import without_others
from llmserve.engine.statistics import StatisticsCounter
from llmserve.models.loading import Loader
from tests.e2e.conftest import ENGINES
from tests.fakes import EOS, VOCAB_SIZE, byte_tokenizer

pytestmark = pytest.mark.slow

ANSWERS = 10  # of each schema
LONGEST = 40  # tokens
LONGEST_REST = 600  # bytes that may follow a cut answer, which is more than any of the schemas needs
WAYS = 20  # to write the rest, which is tried at random where there is a choice


def thing(optional=(), **properties):
    return {"type": "object", "properties": properties, "required": [name for name in properties if name not in optional]}


def text(**keywords):
    return {"type": "string", **keywords}


def integer(least, most):
    return {"type": "integer", "minimum": least, "maximum": most}


def array(items, least=0, most=3):
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def ref(name):
    return {"$ref": f"#/$defs/{name}"}


NULL = {"type": "null"}
SHORT = text(maxLength=12)
CAT = thing(kind={"const": "cat"}, lives=integer(0, 9))
DOG = thing(kind={"const": "dog"}, tricks=array(SHORT))
TREE = thing(name=SHORT, children=array(ref("tree"), most=2))
CHAIN = thing(value=integer(-9, 9), next={"anyOf": [ref("chain"), NULL]})
SUM = thing(left=ref("term"), right=ref("term"))
PERSON = thing(name=SHORT, address=thing(street=SHORT, place=thing(town=SHORT, code=text(pattern="^[0-9]{5}$"))))

SCHEMAS = {
    "flat": thing(name=SHORT, age=integer(0, 120), married={"type": "boolean"}),
    "nested": PERSON,
    "nested in arrays": array(thing(tags=array(SHORT), size=integer(1, 3)), 1, 2),
    "optional members": thing(optional=("b", "c"), a=SHORT, b=integer(1, 5), c=NULL),
    "a tree": {"$defs": {"tree": TREE}, **ref("tree")},
    "a chain": {"$defs": {"chain": CHAIN}, **ref("chain")},
    "each in the other": {"$defs": {"sum": SUM, "term": {"anyOf": [integer(0, 99), ref("sum")]}}, **ref("sum")},
    "a union of scalars": {"anyOf": [integer(0, 9), {"type": "boolean"}, NULL, SHORT]},
    "a union of objects": array({"anyOf": [CAT, DOG]}, 1, 2),
    "one of several": {"$defs": {"cat": CAT, "dog": DOG}, "oneOf": [ref("cat"), ref("dog")]},
    "several types": thing(value={"type": ["string", "integer", "null"], "maxLength": 9}),
    "all of several": {"allOf": [thing(a=SHORT), thing(b=integer(0, 9))]},
    "an enum": thing(colour={"enum": ["red", "green", "dark blue"]}, size={"enum": ["S", "M", "L"]}),
    "an enum of many kinds": array({"enum": [1, "one", None, True, 2.5, {"a": [1]}]}, 2, 4),
    "constants": thing(version={"const": 3}, unit={"const": "km/h"}),
    "integers": thing(a=integer(-50, -7), b=integer(1000, 1999), c={"type": "integer", "exclusiveMinimum": 0, "maximum": 12}),
    "decimals": thing(
        celsius={"type": "number", "minimum": -40, "maximum": 56.7}, share={"type": "number", "minimum": 0, "exclusiveMaximum": 1}
    ),
    "multiples": array({"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 500}, 2, 4),
    "a long string": thing(story=text(minLength=80, maxLength=160)),
    "a string of any length": thing(story=text()),
    "strings of some length": array(text(minLength=3, maxLength=5), 2, 3),
    "a pattern": thing(plate=text(pattern="^[A-Z]{1,3}-[A-Z]{2} [0-9]{1,4}$"), tag=text(pattern="^(x|yy)+$")),
    "unicode names": thing(**{"größe": integer(1, 9), "名前": SHORT, "😀": {"type": "boolean"}}),
    "unicode values": thing(gruß={"enum": ["schön", "こんにちは", "🎉 \"ok\" \\ \n"]}, слово=text(pattern="^[а-я]{2,6}$")),
    "dates": thing(day=text(format="date"), hour=text(format="time"), moment=text(format="date-time")),
    "addresses": thing(mail=text(format="email"), host=text(format="ipv4"), id=text(format="uuid")),
    "a tuple": {"type": "array", "prefixItems": [SHORT, integer(0, 9), {"type": "boolean"}], "items": False, "minItems": 3},
    "any names": {"type": "object", "additionalProperties": integer(0, 99)},
    "names of a pattern": {"type": "object", "patternProperties": {"^[a-c]_[0-9]$": SHORT}, "additionalProperties": False},
    "any object": {"type": "object"},
}  # fmt: skip


def grammar(schema):
    return Grammar("json_schema", json.dumps(without_others(schema), ensure_ascii=False))


@pytest.fixture(scope="module", params=ENGINES)
def answers(request):
    """Of each schema, what the model wrote, byte by byte, and why it ended."""
    spec = replace(DEFAULT_MODEL, engine=request.param, context_length=512, max_waiting=len(SCHEMAS))
    engine = Loader(load().server).prepare(spec).open(StatisticsCounter())
    try:
        generations = {name: submit(engine, name, seed) for seed, name in enumerate(SCHEMAS)}
        yield {name: read(generation) for name, generation in generations.items()}
    finally:
        engine.close()


def submit(engine, name, seed):
    question = {"role": "user", "content": f"Write an example of {name} in JSON."}
    prompt_ids = engine.tokenizer.encode(engine.chat_template.render([question], add_generation_prompt=True))
    sampling = SamplingParams(temperature=1.5, seed=seed)
    params = GenerationParams(LONGEST, n=ANSWERS, sampling=sampling, grammar=grammar(SCHEMAS[name]), logprobs=0)
    return engine.submit(prompt_ids, params)


def read(generation):
    written, reasons = [b""] * ANSWERS, [None] * ANSWERS
    for event in generation.events(600):
        if isinstance(event, Delta):
            written[event.choice] += b"".join(token.piece for token in event.tokens)
        elif isinstance(event, ChoiceEnd):
            reasons[event.choice] = event.finish_reason
    return list(zip(written, reasons, strict=True))


FORMATS = jsonschema.FormatChecker(["date", "email", "ipv4", "uuid"])


@FORMATS.checks("date-time", ValueError)
def is_moment(value):
    """RFC 3339, in either case."""
    return bool(datetime.fromisoformat(value.upper()))


@FORMATS.checks("time", ValueError)
def is_time(value):
    return is_moment(f"2000-01-01T{value}")


def is_valid(document, schema):
    return jsonschema.Draft202012Validator(schema, format_checker=FORMATS).is_valid(json.loads(document))


@pytest.fixture(scope="module")
def constraints():
    return Constraints(byte_tokenizer())


ENDS = [EOS, *b'"@}],:']
"""What leads to the end of a document where it is allowed, the surest first."""
DETOURS = {*b" \n\t\\-.eE+{[,"}


def finish(constraint, written, rng):
    """A document that begins with what was written, without the detours that can be helped; None if that took too long."""
    document = bytearray(written)
    for value in written:
        assert value in allowed(constraint), f"the grammar does not allow {chr(value)!r} in {written!r}"
        constraint.advance(value)
    while len(document) < len(written) + LONGEST_REST:
        if constraint.complete:
            return bytes(document)
        following = allowed(constraint)
        choice = next((value for value in ENDS if value in following), None)
        if choice == EOS:
            return bytes(document)
        if choice is None:
            choice = rng.choice(sorted(following - DETOURS) or sorted(following))
        document.append(choice)
        constraint.advance(choice)
    return None


def allowed(constraint):
    return {int(value) for value in np.flatnonzero(np.isfinite(constraint.apply(np.zeros(VOCAB_SIZE, dtype=np.float32))))}


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_ends_by_itself_is_valid(answers, name):
    assert len(answers[name]) == ANSWERS
    for written, reason in answers[name]:
        assert reason in (FinishReason.STOP, FinishReason.LENGTH)
        assert reason is FinishReason.LENGTH or is_valid(written, SCHEMAS[name]), written


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_is_cut_is_the_beginning_of_a_valid_document(answers, constraints, name):
    pristine = constraints.get(grammar(SCHEMAS[name]))
    for written, reason in answers[name]:
        if reason is FinishReason.LENGTH:
            ways = (finish(pristine.copy(), written, random.Random(seed)) for seed in range(WAYS))
            document = next((each for each in ways if each is not None), None)
            assert document is not None, f"no way was found to end {written!r}"
            assert is_valid(document, SCHEMAS[name]), document


def test_some_end_and_some_are_cut(answers):
    reasons = [reason for each in answers.values() for _, reason in each]
    print(f"{reasons.count(FinishReason.STOP)} answers ended, {reasons.count(FinishReason.LENGTH)} were cut")
    assert len(reasons) == 300
    assert min(map(reasons.count, (FinishReason.STOP, FinishReason.LENGTH))) > 30
