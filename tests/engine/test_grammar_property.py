"""Random schemas, random answers: what a grammar lets end is valid, by an independent validator."""

import json

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmserve.engine.constraint import Constraints
from llmserve.engine.generation import Grammar
from tests.fakes import EOS, VOCAB_SIZE, byte_tokenizer

CONSTRAINTS = Constraints(byte_tokenizer())
PIECES = """{" "} "} ": ": {"a":1 "," ", 12 -1 19 00 "a "aa "b ab bc xx yy true true} nul ull null, [1 [{ [[ }] ]} \\" \\n \\u00 é" -0 200 20-0 T1 Z" :0""".split()
LONGEST = 400  # bytes; an answer that is longer is cut
NAMES = st.text("abcé 0_", min_size=1, max_size=4)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), st.text('ab"\\é\n', max_size=4))


def strings():
    formats = st.sampled_from(["date", "date-time", "uuid", "ipv4", "email"]).map(
        lambda name: {"type": "string", "format": name}
    )
    lengths = st.tuples(st.integers(0, 3), st.integers(0, 4)).map(
        lambda size: {"type": "string", "minLength": size[0], "maxLength": size[0] + size[1]}
    )
    patterns = st.sampled_from(["^[a-c]{2,4}$", "^(x|yy)+$", "^\\d+-\\d+$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    )
    return st.one_of(formats, lengths, patterns)


def numbers():
    bounds = st.tuples(st.integers(-50, 50), st.integers(0, 100))
    return bounds.flatmap(
        lambda bound: st.sampled_from(["integer", "number"]).map(
            lambda kind: {"type": kind, "minimum": bound[0], "maximum": bound[0] + bound[1]}
        )
    )


def objects(inner):
    def build(properties, required, closed):
        schema = {"type": "object", "properties": properties, "required": [name for name in properties if name in required]}
        return schema | ({"additionalProperties": False} if closed else {})

    properties = st.dictionaries(NAMES, inner, max_size=3)
    return properties.flatmap(
        lambda given: st.builds(build, st.just(given), st.sets(st.sampled_from([*given] or [""])), st.booleans())
    )


def arrays(inner):
    return st.builds(
        lambda items, least, more: {"type": "array", "items": items, "minItems": least, "maxItems": least + more},
        inner,
        st.integers(0, 2),
        st.integers(0, 2),
    )


LEAVES = st.one_of(
    strings(),
    numbers(),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["string", "null"], "maxLength": 3}]),
    st.lists(SCALARS, min_size=1, max_size=3).map(lambda values: {"enum": values}),
    SCALARS.map(lambda value: {"const": value}),
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        objects(inner), arrays(inner), st.lists(inner, min_size=1, max_size=3).map(lambda any_of: {"anyOf": any_of})
    ),
    max_leaves=6,
)
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 5},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["name", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}


def write(schema, rng):
    """An answer of random tokens, and whether it ended by itself. Ends of strings and structures are likelier than other bytes."""
    constraint = CONSTRAINTS.get(Grammar("json_schema", json.dumps(schema))).copy()
    written = bytearray()
    scores = np.zeros(VOCAB_SIZE, dtype=np.float32)
    scores[[*b'"}],:', EOS]] = 4
    scores[[*b" \n\t"]] = -3
    while len(written) < LONGEST:
        weights = constraint.apply(scores) + rng.gumbel(size=VOCAB_SIZE)
        token_id = int(weights.argmax())
        if token_id == EOS:
            return bytes(written), True
        written.append(token_id)
        constraint.advance(token_id)
        assert not constraint.stuck, (schema, bytes(written))
        if constraint.complete:
            return bytes(written), True
    return bytes(written), False


def check(schema, seed):
    text, ended = write(schema, np.random.default_rng(seed))
    if ended:
        value = json.loads(text)
        jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(value)
    return ended


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(SCHEMAS, st.integers(0, 2**32 - 1))
def test_what_ends_by_itself_is_valid(schema, seed):
    check(schema, seed)


@pytest.fixture(scope="module")
def of_pieces():
    """Constraints of a vocabulary that has pieces of several bytes as well, in the place of bytes that are no text."""
    tokenizer = byte_tokenizer()
    tokenizer._pieces[0x80 : 0x80 + len(PIECES)] = [piece.encode() for piece in PIECES]
    return Constraints(tokenizer)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(SCHEMAS, st.integers(0, 2**32 - 1))
def test_a_question_about_any_token_is_answered_as_the_mask_says(of_pieces, schema, seed):
    rng = np.random.default_rng(seed)
    constraint = of_pieces.get(Grammar("json_schema", json.dumps(schema))).copy()
    for _ in range(30):
        said = {token_id for token_id in range(VOCAB_SIZE) if constraint.allows(token_id)}
        masked = {int(each) for each in np.flatnonzero(np.isfinite(constraint.apply(np.zeros(VOCAB_SIZE, dtype=np.float32))))}
        assert said == masked
        if constraint.stuck or said == {EOS}:
            break
        constraint.advance(int(rng.choice(sorted(said - {EOS}))))
        if constraint.complete:
            break


def test_recursion_ends():
    assert sum(check(TREE, seed) for seed in range(50)) > 10
