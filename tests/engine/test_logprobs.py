"""Scores of tokens and their way out with the text, on both engines."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.engine.generation import ChoiceEnd, Delta, FinishReason, GenerationParams, PromptScores, SamplingParams
from llmserve.engine.logprobs import TokenScorer
from llmserve.engine.sequence import Sequence
from tests.fakes import EOS, VOCAB_SIZE, FakeBackend, FakeBatchBackend, babble, byte_tokenizer, make_engine, scores_of

ENGINES = {
    "slots": lambda **o: [FakeBackend(**o), FakeBackend(**o)],
    "batch": lambda **o: FakeBatchBackend(num_sequences=2, **o),
}


@pytest.fixture(params=ENGINES)
def make(request):
    engines = []

    def make(**options):
        engines.append(make_engine(ENGINES[request.param](**options), template=None, prefill_chunk=8))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def events_of(engine, prompt, **params):
    return list(
        engine.submit(prompt, GenerationParams(**{"max_tokens": 6, "sampling": SamplingParams(seed=3)} | params)).events(10)
    )


def test_a_score_is_of_the_raw_distribution():
    logits = np.random.default_rng(0).normal(size=VOCAB_SIZE).astype(np.float32)
    score = TokenScorer(3, byte_tokenizer()).score(logits, 65)
    exact = log_softmax(logits)
    assert score.piece == b"A"
    assert score.logprob == pytest.approx(exact[65], abs=1e-5)
    assert [value for _, value in score.top] == pytest.approx(sorted(exact)[:-4:-1], abs=1e-5)


def test_equal_alternatives_come_by_id_and_control_tokens_by_name():
    logits = np.zeros(VOCAB_SIZE, dtype=np.float32)
    logits[[EOS, 100, 99]] = 5
    assert [piece for piece, _ in TokenScorer(3, byte_tokenizer()).score(logits, 1).top] == [b"c", b"d", b"<eos>"]


def test_the_tokens_of_an_answer_carry_their_scores(make):
    events = events_of(make(), [1, 2, 3], logprobs=2, n=2)
    for index in (0, 1):
        deltas = [event for event in events if isinstance(event, Delta) and event.choice == index]
        tokens = [token for delta in deltas for token in delta.tokens]
        text = "".join(delta.text for delta in deltas)
        assert len(tokens) == 6
        assert b"".join(token.piece for token in tokens).decode() == text
        held = [1, 2, 3]
        for token in tokens:
            assert token.logprob == pytest.approx(log_softmax(scores_of(babble(held)))[token.piece[0]], abs=1e-5)
            assert token.top[0][1] >= token.logprob
            held.append(token.piece[0])


def test_scores_are_there_only_when_asked_for(make):
    assert all(not event.tokens for event in events_of(make(), [1]) if isinstance(event, Delta))


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_the_tokens_of_a_prompt_are_scored(make, max_tokens):
    prompt = [*b"it was a dark and stormy night"]
    engine = make()
    events_of(engine, prompt)  # what the caches hold is of no use
    events = events_of(engine, prompt, max_tokens=max_tokens, logprobs=1, prompt_logprobs=True, n=2)
    (scores,) = [event for event in events if isinstance(event, PromptScores)]
    assert bytes(prompt) == b"".join(token.piece for token in scores.tokens)
    assert scores.tokens[0].logprob is None
    for position, token in enumerate(scores.tokens[1:], 1):
        assert token.logprob == pytest.approx(log_softmax(scores_of(babble(prompt[:position])))[prompt[position]], abs=1e-5)
    ends = [event for event in events if isinstance(event, ChoiceEnd)]
    assert [(end.finish_reason, end.num_output_tokens) for end in ends] == [(FinishReason.LENGTH, max_tokens)] * 2
    assert events[-1].num_cached_tokens == 0


def write(text, stop=(), cuts=None):
    """The deltas of a sequence that writes `text`, in tokens cut at these bytes, else one for each, and EOS."""
    data = text.encode()
    ends = range(1, len(data) + 1) if cuts is None else [*sorted({cut for cut in cuts if 0 < cut < len(data)}), len(data)]
    tokenizer = byte_tokenizer()
    pieces = [data[begin:end] for begin, end in pairwise([0, *ends])]
    tokenizer._pieces[: len(pieces)] = pieces
    sequence = Sequence(0, [1], GenerationParams(100, stop=stop, logprobs=0), tokenizer)
    deltas = []
    for token_id in [*range(len(pieces)), EOS]:
        scores = np.full(VOCAB_SIZE, -50, dtype=np.float32)
        scores[token_id] = 50
        assert sequence.sample(scores) == token_id
        if delta := sequence.append(token_id):
            deltas.append(delta)
        if sequence.finish_reason is not None:
            break
    return deltas


def test_half_a_character_waits_for_the_other_half():
    assert pieces_of(write("aé")) == [
        ("a", [b"a"]),
        ("é", [b"\xc3", b"\xa9"]),
    ]


def test_what_may_become_a_stop_string_waits_and_what_became_one_is_left_out():
    deltas = write("xaby", stop=("abc",))
    assert [(delta.text, len(delta.tokens)) for delta in deltas] == [("x", 1), ("aby", 3)]
    deltas = write("xabcd", stop=("abc",))
    assert [(delta.text, len(delta.tokens)) for delta in deltas] == [("x", 1)]


def pieces_of(deltas):
    return [(delta.text, [token.piece for token in delta.tokens]) for delta in deltas]


def test_text_waits_for_the_rest_of_its_token():
    assert pieces_of(write("a\n they", stop=(" the.",), cuts=[1, 3])) == [("a", [b"a"]), ("\n they", [b"\n ", b"they"])]
    assert pieces_of(write("a\n the.", stop=(" the.",), cuts=[1, 3])) == [("a", [b"a"]), ("\n", [b"\n"])]


def test_a_token_that_a_stop_string_cuts_keeps_what_is_text():
    assert pieces_of(write(" wörld. Or", stop=(".",), cuts=[])) == [(" wörld", [" wörld".encode()])]
    assert pieces_of(write("aé the", stop=("é the",), cuts=[2])) == [("a", [b"a"])]


@settings(deadline=None)
@given(
    st.text(alphabet="abé€😀", max_size=12),
    st.lists(st.text(alphabet="abé", min_size=1, max_size=3), max_size=2),
    st.none() | st.lists(st.integers(1, 40)),
)
def test_the_bytes_of_the_tokens_are_those_of_the_text(text, stop, cuts):
    deltas = write(text, tuple(stop), cuts)
    for delta in deltas:
        assert b"".join(token.piece for token in delta.tokens).decode() == delta.text
