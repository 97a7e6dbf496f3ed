"""Which pairs are chosen from several candidates, against a search through all of them."""

import itertools

import numpy as np
import pytest

from xpo_jax.algorithm import pairing
from xpo_jax.values import Prompts, Samples


def candidates(tokens, finished=None):
    """Return candidates with these tokens [C][B][T], none of which is padding."""
    tokens = np.array(tokens, np.int32)
    finished = np.ones(tokens.shape[:2], bool) if finished is None else np.array(finished, bool)
    return pairing.Candidates(tokens, np.full(tokens.shape[:2], tokens.shape[-1], np.int32), finished)


def test_all_pairs_begins_with_the_pair_of_two_candidates_and_has_candidate_1_second():
    assert pairing.all_pairs(2) == [(0, 1)]
    assert pairing.all_pairs(4) == [(0, 1), (2, 1), (3, 1), (0, 2), (0, 3), (2, 3)]
    for count in range(2, 7):
        pairs = pairing.all_pairs(count)
        assert {frozenset(pair) for pair in pairs} == set(
            map(frozenset, itertools.combinations(range(count), 2))
        )
        assert pairing.pairs_per_prompt("all", count) == len(pairs)
    assert pairing.pairs_per_prompt("best_worst", 5) == pairing.pairs_per_prompt(None, 2) == 1
    assert pairing.policy_numbers(1) == (0,)
    assert pairing.policy_numbers(4) == (0, 2, 3, 4)


def test_split_separates_the_candidates_of_each_prompt():
    rows = np.arange(6)  # of prompts 0 0 1 1 2 2
    samples = Samples(np.stack([rows, rows + 10], 1), rows, rows % 2 == 0)
    first, second = pairing.split(samples, 2)
    assert first.lengths.tolist() == [0, 2, 4] and second.tokens.tolist() == [[1, 11], [3, 13], [5, 15]]
    assert first.finished.all() and not second.finished.any()


def test_informative_leaves_out_equal_tokens_and_unfinished_ones_that_lose():
    of = candidates([[[1, 2]], [[1, 2]], [[1, 3]]], [[True], [True], [False]])
    by_pair = lambda loses: dict(
        zip(pairing.all_pairs(3), pairing.informative(of, unfinished_loses=loses)[:, 0].tolist(), strict=True)
    )
    assert by_pair(False) == {(0, 1): False, (2, 1): True, (0, 2): True}
    assert by_pair(True) == {(0, 1): False, (2, 1): False, (0, 2): False}


def test_informative_ignores_what_is_beyond_the_length():
    tokens = np.array([[[1, 2, 9]], [[1, 2, 0]]], np.int32)
    of = pairing.Candidates(tokens, np.array([[2], [2]]), np.ones((2, 1), bool))
    assert not pairing.informative(of, unfinished_loses=False).any()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_rules_equal_a_search_through_all_pairs(count):
    rng = np.random.default_rng(count)
    B, pairs = 200, pairing.all_pairs(count)
    values = rng.integers(0, 6, (count, B)).astype(float)  # with many ties
    values[rng.random((count, B)) < 0.1] = -np.inf
    open_to_judge = rng.random((len(pairs), B)) < 0.7
    finite = np.where(np.isfinite(values), values, 0.0)
    uncertain = pairing.choose_by_rewards("uncertain", finite, open_to_judge)
    optimistic = pairing.choose_by_rewards("optimistic", finite, open_to_judge)
    worst = pairing.choose_by_scores("best_worst", values)
    quartile = pairing.choose_by_scores("best_quantile", values)
    for b in range(B):
        open_pairs = [pair for number, pair in enumerate(pairs) if open_to_judge[number, b]]
        gap = lambda pair, b=b: abs(finite[pair[0], b] - finite[pair[1], b])
        assert pairs[uncertain[b]] == min(open_pairs, key=gap, default=(0, 1))
        with_second = [pair for pair in open_pairs if pair[1] == 1]
        assert pairs[optimistic[b]] == max(
            with_second, key=lambda pair, b=b: finite[pair[0], b], default=(0, 1)
        )
        ranked = sorted(range(count), key=lambda c, b=b: values[c, b])
        best = max(range(count), key=lambda c, b=b: values[c, b])
        ranked.remove(best)
        assert set(pairs[worst[b]]) == {best, ranked[0]}
        assert set(pairs[quartile[b]]) == {best, ranked[(count - 1) // 4]}


def test_scores_that_are_missing_are_not_chosen_unless_fewer_than_two_are_there():
    nan = np.nan
    scores = np.array([[nan, 1.0, nan], [2.0, nan, nan], [1.0, 3.0, nan], [3.0, nan, 5.0]])
    chosen = [pairing.all_pairs(4)[i] for i in pairing.choose_by_scores("best_worst", scores)]
    assert chosen == [(2, 3), (0, 2), (0, 1)]


def test_take_pairs_repeats_prompts_and_numbers_the_positions():
    of = candidates([[[c * 10 + b] for b in range(2)] for c in range(3)])
    prompts = Prompts(
        rows=({"n": 0}, {"n": 1}),
        messages=("m0", "m1"),
        tokens=np.array([[5], [6]]),
        lengths=np.array([1, 1]),
        position=np.array([0, 1], np.int32),
        valid=np.array([True, False]),
    )
    everything = pairing.take_pairs(prompts, of, np.tile(np.arange(3), (2, 1)))
    assert everything.samples[0].tokens[:, 0].tolist() == [0, 20, 0, 1, 21, 1]
    assert everything.samples[1].tokens[:, 0].tolist() == [10, 10, 20, 11, 11, 21]
    assert everything.prompts.position.tolist() == [0, 1, 2, 3, 4, 5]
    assert [row["n"] for row in everything.prompts.rows] == [0, 0, 0, 1, 1, 1]
    assert everything.prompts.valid.tolist() == [True] * 3 + [False] * 3
    one = pairing.take_pairs(prompts, of, np.array([[0], [0]]))
    assert one.prompts.position.tolist() == [0, 1] and one.samples[0].tokens[:, 0].tolist() == [0, 1]
