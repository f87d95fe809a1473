import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.engine.constraint import Constraints
from llmserve.engine.generation import Grammar, SamplingParams
from llmserve.engine.sampling import Sampler
from tests.fakes import VOCAB_SIZE, byte_tokenizer

LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -3.0], dtype=np.float32)


def softmax(logits, temperature=1.0):
    weights = np.exp((logits - logits.max()) / temperature, dtype=np.float64)
    return weights / weights.sum()


def frequencies(params, logits, draws=8_000):
    sampler = Sampler(params, [])
    return np.bincount([sampler.sample(logits) for _ in range(draws)], minlength=len(logits))


def chi_square(observed, probabilities):
    """Pearson's statistic, over the cells that can occur; those that cannot must be empty."""
    possible = probabilities > 0
    assert observed[~possible].sum() == 0
    expected = probabilities[possible] * observed.sum()
    return float(((observed[possible] - expected) ** 2 / expected).sum()), int(possible.sum()) - 1


def truncated(probabilities, keep):
    kept = np.where(keep, probabilities, 0)
    return kept / kept.sum()


P = softmax(LOGITS)
CASES = {
    "plain": (SamplingParams(seed=1), P),
    "hot": (SamplingParams(seed=2, temperature=1.8), softmax(LOGITS, 1.8)),
    "cold": (SamplingParams(seed=3, temperature=0.3), softmax(LOGITS, 0.3)),
    "top_k": (SamplingParams(seed=4, top_k=3), truncated(P, [1, 1, 1, 0, 0, 0])),
    "top_p": (SamplingParams(seed=5, top_p=0.8), truncated(P, P.cumsum() - P < 0.8)),
    "min_p": (SamplingParams(seed=6, min_p=0.2), truncated(P, P >= 0.2 * P.max())),
    "top_p of what top_k leaves": (SamplingParams(seed=7, top_k=2, top_p=0.7), truncated(P, [1, 0, 0, 0, 0, 0])),
    "all three": (SamplingParams(seed=8, top_k=5, top_p=0.99, min_p=0.1), truncated(P, P >= 0.1 * P.max())),
}
# The 99.99 % quantiles of chi-square with 0 to 5 degrees of freedom.
QUANTILES = [1e-9, 15.14, 18.43, 21.11, 23.52, 25.75]


@pytest.mark.parametrize("case", CASES)
def test_draws_match_the_distribution(case):
    params, probabilities = CASES[case]
    statistic, degrees = chi_square(frequencies(params, LOGITS), probabilities)
    assert statistic <= QUANTILES[degrees]


def test_draws_match_the_distribution_of_a_vocabulary_of_several_blocks():
    logits = np.random.default_rng(0).normal(0, 2, 700).astype(np.float32)
    observed = frequencies(SamplingParams(seed=9), logits, draws=20_000)
    groups = np.arange(700) // 20
    probabilities = np.bincount(groups, weights=softmax(logits))
    statistic, degrees = chi_square(np.bincount(groups, weights=observed), probabilities)
    assert degrees == 34
    assert statistic < 76.0  # 99.99 % quantile of chi-square with 34 degrees of freedom


@pytest.mark.parametrize("num_others", [1, 4, 70], ids=["mostly asked", "asked and masked", "mostly masked"])
@pytest.mark.parametrize("case", CASES)
def test_draws_within_a_grammar_match_the_distribution_that_is_masked(case, num_others):
    """Six letters are allowed; so many other tokens, each likelier than most of them, are not."""
    params, probabilities = CASES[case]
    sampler = Sampler(params, [])
    begun = Constraints(byte_tokenizer()).get(Grammar("regex", "[0-9][a-f]+")).copy()
    begun.advance(ord("0"))
    scores = np.full(VOCAB_SIZE, -np.inf, dtype=np.float32)
    scores[97:103] = LOGITS
    scores[128 : 128 + num_others] = 0.6
    observed = np.zeros(VOCAB_SIZE, dtype=np.int64)
    for _ in range(4_000):
        constraint = begun.copy()
        observed[sampler.sample_within(scores, constraint.allows, constraint.apply)] += 1
    assert observed.sum() == observed[97:103].sum()
    statistic, degrees = chi_square(observed[97:103], probabilities)
    assert statistic <= QUANTILES[degrees]


def unasked(scores):
    raise AssertionError("a mask is made that is not needed")


@pytest.mark.parametrize("params", [SamplingParams(0), SamplingParams(1), SamplingParams(0.8, top_p=0.95)])
def test_no_mask_is_made_where_the_likeliest_token_is_allowed_and_drawn(params):
    logits = np.array([0, 1, 30, 0], dtype=np.float32)
    assert Sampler(params, []).sample_within(logits, lambda token_id: token_id == 2, unasked) == 2


@pytest.mark.parametrize("num_likelier", [0, 1, 3, 20])
def test_greedy_within_a_grammar_is_the_likeliest_that_is_allowed(num_likelier):
    scores = -np.arange(40, dtype=np.float32)
    masked = np.where(np.arange(40) < num_likelier, -np.inf, scores)
    sampler = Sampler(SamplingParams(temperature=0), [])
    assert sampler.sample_within(scores, lambda token_id: token_id >= num_likelier, lambda _: masked) == num_likelier


@pytest.mark.parametrize("temperature", [0, 1])
def test_where_a_mask_leaves_nothing_nothing_is_drawn(temperature):
    sampler = Sampler(SamplingParams(temperature), [])
    assert sampler.sample_within(LOGITS, lambda _: False, lambda scores: scores - np.float32(np.inf)) is None


@pytest.mark.parametrize("temperature", [0, 0.2])
def test_what_is_not_allowed_is_drawn_once(temperature):
    asked = []
    Sampler(SamplingParams(temperature), []).sample_within(LOGITS, lambda each: asked.append(each) or False, np.copy)
    assert len(asked) == len(set(asked)) == 5


def test_what_was_drawn_and_not_allowed_is_not_penalized():
    sampler = Sampler(SamplingParams(temperature=0, presence_penalty=1.5), [])
    assert sampler.sample_within(LOGITS, lambda token_id: token_id == 1, unasked) == 1
    assert [sampler.sample(LOGITS), sampler.sample(LOGITS)] == [0, 0]


@pytest.mark.parametrize("vocab_size", [1, 5, 255, 256, 257, 1000])
def test_every_vocabulary_size_can_be_drawn_from(vocab_size):
    logits = np.full(vocab_size, -np.inf, dtype=np.float32)
    logits[-1] = 0
    for params in (SamplingParams(seed=0), SamplingParams(seed=0, top_k=3), SamplingParams(seed=0, top_p=0.5)):
        assert Sampler(params, []).sample(logits) == vocab_size - 1


def test_temperature_zero_is_greedy_and_ties_go_to_the_lower_id():
    assert Sampler(SamplingParams(temperature=0), []).sample(np.array([1, 7, 7, 0], dtype=np.float32)) == 1


def test_top_p_zero_leaves_the_likeliest_token():
    sampler = Sampler(SamplingParams(top_p=0.0, temperature=2.0, seed=1), [])
    assert {sampler.sample(LOGITS) for _ in range(50)} == {0}


def test_equal_seeds_repeat_and_different_seeds_and_choices_differ():
    def draws(seed, choice=0):
        sampler = Sampler(SamplingParams(seed=seed, temperature=2.0), [], choice)
        return [sampler.sample(LOGITS) for _ in range(40)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(7) != draws(7, choice=1)
    assert draws(None) != draws(None)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_every_64_bit_seed_is_taken(seed):
    assert 0 <= Sampler(SamplingParams(seed=seed), []).sample(LOGITS) < len(LOGITS)


def test_presence_and_frequency_penalties_count_the_answer_only():
    sampler = Sampler(SamplingParams(temperature=0, presence_penalty=0.4, frequency_penalty=0.3), prompt_ids=[0, 0, 1])
    # 2.0 against 1.0: after one occurrence 1.3, after two 1.0 (a tie, the lower id), after three 0.7.
    assert [sampler.sample(LOGITS) for _ in range(5)] == [0, 0, 0, 1, 0]


def test_repetition_penalty_counts_the_prompt_and_pushes_both_signs_down():
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=2.0), prompt_ids=[0, 1])
    logits = np.array([1.0, -0.2, 0.6, -0.3], dtype=np.float32)
    assert sampler.sample(logits) == 2
    assert sampler.sample(np.array([-9, -0.2, -9, -0.3], dtype=np.float32)) == 3


def test_many_penalized_tokens_are_all_remembered():
    logits = np.zeros(500, dtype=np.float32)
    sampler = Sampler(SamplingParams(temperature=0, presence_penalty=1.0), [])
    assert sorted(sampler.sample(logits) for _ in range(500)) == list(range(500))


def test_the_logits_are_left_as_they_are():
    before = LOGITS.copy()
    sampler = Sampler(SamplingParams(seed=1, presence_penalty=2.0, repetition_penalty=1.5, top_k=2), [0, 1])
    for _ in range(3):
        sampler.sample(LOGITS)
    assert np.array_equal(before, LOGITS)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_scores_that_are_no_numbers_are_an_error(bad, temperature):
    with pytest.raises(ValueError, match="finite"):
        Sampler(SamplingParams(temperature=temperature), []).sample(np.array([0, bad, 1], dtype=np.float32))


@settings(max_examples=400, deadline=None)
@given(
    logits=st.lists(st.floats(-80, 80, width=32), min_size=1, max_size=600),
    share=st.floats(0, 1),
    temperature=st.floats(0.01, 2),
    top_k=st.integers(0, 700),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_a_drawn_token_is_always_one_that_the_filters_leave(logits, share, temperature, top_k, top_p, min_p, seed):
    scores = np.array(logits, dtype=np.float32)
    sampler = Sampler(SamplingParams(temperature, top_p, top_k, min_p, seed=seed), [])
    if share < 0.5:
        token_id = sampler.sample(scores)
    else:  # within a grammar that allows a part of them
        allowed = np.random.default_rng(seed).random(len(scores)) < share
        allowed[seed % len(scores)] = True
        masked = np.where(allowed, scores, np.float32(-np.inf))
        token_id = sampler.sample_within(scores, allowed.__getitem__, lambda _: masked)
        assert allowed[token_id]
        scores = masked
    likelier = scores > scores[token_id] + np.float32(1e-4) * temperature  # beyond the rounding of exp
    assert not top_k or likelier.sum() < top_k
    assert softmax(scores, temperature)[likelier].sum() <= top_p + 1e-4
    assert np.exp((scores[token_id] - scores.max()) / temperature) >= min_p * (1 - 1e-4)
