"""Draws from vocabularies that are too large to be weighed whole, against what exact arithmetic says of all tokens."""

from itertools import islice

import numpy as np
import pytest

from llmserve.engine.distribution import Distribution
from llmserve.engine.generation import SamplingParams

SIZE = 16_000
RANDOM = np.random.default_rng(0)
SHAPES = {
    "normal": RANDOM.normal(0, 3, SIZE),
    "peaked": RANDOM.normal(0, 5, SIZE),
    "flat": RANDOM.normal(0, 0.3, SIZE),
    "one, and a tail that weighs as much": np.where(np.arange(SIZE) == 4321, 0, -np.log(SIZE) + RANDOM.normal(0, 0.1, SIZE)),
    "few values": RANDOM.integers(0, 9, SIZE),
    "mostly masked": np.where(np.arange(SIZE) % 71 == 3, RANDOM.normal(0, 2, SIZE), -np.inf),
    "equal": np.zeros(SIZE),
}
PARAMS = {
    "top_p": SamplingParams(top_p=0.9),
    "top_p, cold": SamplingParams(0.3, top_p=0.8),
    "top_k": SamplingParams(top_k=40),
    "most of them": SamplingParams(top_k=5000),
    "top_k and top_p": SamplingParams(1.5, top_k=300, top_p=0.7),
    "small top_p": SamplingParams(2.0, top_p=0.01),
    "top_p of nothing": SamplingParams(top_p=0),
    "min_p": SamplingParams(min_p=0.02),
    "top_p and min_p": SamplingParams(top_p=0.95, min_p=0.05),
}


def probabilities(scores, params):
    """By sorting, in float64; of equal scores the first ones are left."""
    weights = np.exp((scores.astype(np.float64) - scores.max()) / params.temperature)
    order = np.argsort(-scores, kind="stable")
    if params.top_k:
        weights[order[params.top_k :]] = 0
    before = weights[order].cumsum() - weights[order]
    weights[order[1:][before[1:] >= params.top_p * weights.sum() * (1 - 1e-9)]] = 0
    weights[weights < params.min_p * (1 - 1e-6)] = 0
    return weights / weights.sum()


def assert_drawn_from(expected, drawn):
    """Pearson's test on 20 groups of about the same probability, taken from all over the vocabulary."""
    assert (expected[drawn] > 0).all()
    possible = np.random.default_rng(1).permutation(np.flatnonzero(expected))
    groups = np.minimum((expected[possible].cumsum() * 20).astype(int), 19)
    shares = np.bincount(groups, expected[possible], 20) * len(drawn)
    group_of = np.zeros(len(expected), dtype=int)
    group_of[possible] = groups
    counts = np.bincount(group_of[drawn], minlength=20)
    possible = shares > 0
    statistic = ((counts[possible] - shares[possible]) ** 2 / shares[possible]).sum()
    assert statistic < 50.8  # 99.99 % quantile of chi-square with 19 degrees of freedom


@pytest.mark.parametrize("shape", ["normal", "peaked", "one, and a tail that weighs as much"])
def test_few_tokens_are_weighed_and_the_others_bounded(shape):
    """Else what follows would test something else."""
    distribution = Distribution(SHAPES[shape].astype(np.float32), 1.0)
    top = distribution._top
    assert len(top.weights) < SIZE / 16
    assert 0 < top.bound < 1000 * top.weights.sum()
    nucleus = [distribution._in_nucleus(token_id, 0.9) for token_id in range(0, SIZE, 16)]
    assert nucleus == (probabilities(distribution._scores, SamplingParams(top_p=0.9))[::16] > 0).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_first_draws_are_from_all_tokens(shape, temperature):
    scores = SHAPES[shape].astype(np.float32)
    rng = np.random.default_rng(2)
    drawn = [next(Distribution(scores, temperature).draws(rng)) for _ in range(500)]
    assert_drawn_from(probabilities(scores, SamplingParams(temperature)), drawn)


@pytest.mark.slow
@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_truncated_draws_are_from_what_is_left(shape, params):
    scores, params = SHAPES[shape].astype(np.float32), PARAMS[params]
    rng = np.random.default_rng(3)
    drawn = [Distribution(scores, params.temperature).draw_kept(params, rng) for _ in range(200)]
    assert_drawn_from(probabilities(scores, params), drawn)


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_was_drawn_already_is_taken_if_it_is_left(shape, params):
    scores, params = SHAPES[shape].astype(np.float32), PARAMS[params]
    left = probabilities(scores, params) > 0
    distribution = Distribution(scores, params.temperature)
    rng = np.random.default_rng(4)
    for first in rng.integers(SIZE, size=40).tolist():
        drawn = distribution.draw_kept(params, rng, first)
        assert drawn == first if left[first] else left[drawn]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_token_is_drawn_once(shape):
    drawn = list(islice(Distribution(SHAPES[shape].astype(np.float32), 1.0).draws(np.random.default_rng(5)), 400))
    assert len(set(drawn)) == len(drawn) >= min(400, np.isfinite(SHAPES[shape]).sum())


def test_all_tokens_are_drawn():
    scores = SHAPES["mostly masked"].astype(np.float32)
    drawn = list(Distribution(scores, 1.0).draws(np.random.default_rng(5)))
    assert sorted(drawn) == np.flatnonzero(np.isfinite(scores)).tolist()


@pytest.mark.parametrize("shape", ["normal", "peaked", "one, and a tail that weighs as much"])
def test_second_draws_are_from_what_the_first_left(shape):
    scores = SHAPES[shape].astype(np.float32)
    second = [next(islice(Distribution(scores, 1.0).draws(np.random.default_rng(seed)), 1, None)) for seed in range(300)]
    first = probabilities(scores, SamplingParams())
    expected = first * (np.sum(first / (1 - first)) - first / (1 - first))  # drawn second, behind any other
    assert expected.sum() == pytest.approx(1)
    assert_drawn_from(expected, second)
