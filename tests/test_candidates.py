"""Runs with several candidates a prompt: what is drawn, chosen, put to the judge, logged and learned from."""

import json

import numpy as np
import pytest
from fakes import Recording, Scoring
from tiny_run import changed_config, killed_at_update, read_metrics, run_contents, run_name

from xpo_jax.algorithm.pairing import all_pairs

pytestmark = pytest.mark.usefixtures("one_device")
STEPS = 3


@pytest.fixture(autouse=True)
def reset_judges():
    Scoring.calls.clear()
    Recording.calls.clear()


@pytest.fixture(scope="module")
def run(folder):
    """Return a function that runs a changed tiny config in folder/name, and returns its directory."""

    def start(name, **changes):
        config = changed_config(
            folder, steps=STEPS, data__buckets=(40,), judge__name="fakes:Scoring", **changes
        )
        status, _, err = run_name(folder, name, config)
        assert status == 0, err
        return folder / name

    return start


def pairs_of(path):
    return [json.loads(line) for line in (path / "pairs.jsonl").read_text().splitlines()]


def result_of(path):
    return json.loads((path / "result.json").read_text())


def tokens(pair):
    return tuple(tuple(response["tokens"]) for response in pair["responses"])


@pytest.fixture(scope="module")
def every_pair(run):
    return run("all", loss__candidates=3, loss__pairing="all", checkpoint__every_steps=1)


def test_all_pairs_of_a_prompt_are_judged_by_its_answers_scores_and_each_answer_is_scored_once(every_pair):
    pairs = pairs_of(every_pair)
    assert len(pairs) == len(all_pairs(4)) * (8 + 8 + 5)  # the third batch is partial
    queries = 0
    for start in range(0, len(pairs), 6):
        of_prompt = pairs[start : start + 6]
        assert [pair["position"] % 6 for pair in of_prompt] == list(range(6))
        assert len({pair["position"] // 6 for pair in of_prompt}) == 1
        scores = {c["text"]: c["score"] for c in of_prompt[0]["candidates"]}
        assert all("candidates" not in pair for pair in of_prompt[1:])
        assert scores == {text: len(text) for text in scores}
        queries += len(scores)
        numbered = [c["text"] for c in of_prompt[0]["candidates"]]
        for (i, j), pair in zip(all_pairs(4), of_prompt, strict=True):
            a, b = (response["text"] for response in pair["responses"])
            assert (a, b) == (numbered[i], numbered[j])
            assert pair["p_first"] == 0.5 + 0.5 * np.sign(len(a) - len(b)) and pair["weight"] == 1
    assert result_of(every_pair)["judge_queries"] == queries
    assert result_of(every_pair)["compilations_during_run"] == 0


def test_first_and_second_candidate_are_those_of_a_run_with_two(every_pair, run):
    """Before the first update: the draws of further candidates disturb neither."""
    two = pairs_of(run("two"))
    first_pairs = [pair for pair in pairs_of(every_pair) if pair["step"] == 0 and pair["position"] % 6 == 0]
    assert [tokens(pair) for pair in first_pairs] == [tokens(pair) for pair in two if pair["step"] == 0]
    others = [pair for pair in pairs_of(every_pair) if pair["step"] == 0 and pair["position"] % 6 == 1]
    assert [tokens(pair)[0] for pair in others] != [tokens(pair)[0] for pair in first_pairs]


def test_z_is_exactly_zero_before_the_first_update(every_pair):
    first = read_metrics(every_pair)[1]
    assert first["rewards/margins"] == 0 and first["objective/kl"] == 0


def test_scored_run_that_is_killed_resumes_to_the_same_bits_and_scores_no_answer_again(
    every_pair, run, folder
):
    Scoring.calls.clear()
    with killed_at_update(1):
        run("killed", loss__candidates=3, loss__pairing="all", checkpoint__every_steps=1)
    before = sum(map(len, Scoring.calls))
    Scoring.calls.clear()
    run("killed", loss__candidates=3, loss__pairing="all", checkpoint__every_steps=1)
    assert run_contents(folder / "killed") == run_contents(every_pair)
    assert before + sum(map(len, Scoring.calls)) == result_of(every_pair)["judge_queries"]


@pytest.mark.parametrize("rule", ["best_worst", "best_quantile"])
def test_rules_by_score_take_one_pair_and_count_every_answer(run, rule):
    path = run(rule, loss__candidates=3, loss__pairing=rule)
    for pair in pairs_of(path):
        lengths = sorted(len(c["text"]) for c in pair["candidates"])
        assert sorted(len(response["text"]) for response in pair["responses"]) == [lengths[0], lengths[-1]]
    assert len(pairs_of(path)) == 21
    assert result_of(path)["judge_queries"] == sum(
        len({c["text"] for c in p["candidates"]}) for p in pairs_of(path)
    )


@pytest.mark.parametrize("second", ["reference", "policy"])
@pytest.mark.parametrize("rule", ["uncertain", "optimistic"])
def test_rules_by_reward_ask_for_one_verdict_a_prompt(run, rule, second):
    path = run(
        f"{rule}_{second}",
        loss__candidates=3,
        loss__pairing=rule,
        loss__second_candidate=second,
        judging__both_orders=True,
    )
    pairs = pairs_of(path)
    assert len(pairs) == 21 and all("candidates" not in pair for pair in pairs)
    queried = sum(pair["shown"] is not None for pair in pairs)
    assert result_of(path)["judge_queries"] == 2 * queried
    assert not Scoring.calls  # a judge that scores is not asked for scores


def test_uncertain_before_the_first_update_is_the_pair_of_a_run_with_two_where_it_is_informative(run):
    """All rewards are 0 then, so the first pair whose answers differ is taken."""
    two, uncertain = (
        pairs_of(run("two_again")),
        pairs_of(run("u", loss__candidates=3, loss__pairing="uncertain")),
    )
    compared = 0
    for expected, pair in zip(two[:8], uncertain[:8], strict=True):
        if len(set(tokens(expected))) == 2:
            assert tokens(pair) == tokens(expected)
            compared += 1
    assert compared


@pytest.mark.parametrize("variant", ["algorithm_2", "bounded", "rejected", "robust"])
def test_bonus_of_a_first_step_follows_from_its_pairs_log(run, variant):
    """There pi is ref, so that the bonus is alpha times log ref of its sample, and the bounded one is 0."""
    alpha, beta, e = 0.02, 0.1, 0.2
    changes = {
        "algorithm_2": {"loss__second_candidate": "policy"},
        "bounded": {"loss__second_candidate": "policy", "loss__bonus": "bounded"},
        "rejected": {"loss__second_candidate": "policy", "loss__bonus_sample": "rejected"},
        "robust": {"loss__flip_rate": e},
    }[variant]
    path = run(variant, loss__alpha=alpha, loss__beta=beta, **changes)
    first = [pair for pair in pairs_of(path) if pair["step"] == 0]
    ref = np.array([pair["ref_logps"] for pair in first])
    p = np.array([pair["p_first"] for pair in first])
    of_sample = {"bounded": 0 * p, "rejected": p * ref[:, 1] + (1 - p) * ref[:, 0]}.get(variant, ref[:, 1])
    metrics = read_metrics(path)
    assert metrics[1]["loss/xpo"] == pytest.approx(alpha * of_sample.mean(), rel=1e-5, abs=1e-9)
    assert metrics[1]["loss/dpo"] == pytest.approx(np.log(2), rel=1e-6)
    assert metrics[1]["loss/clipped_share"] == 0
    if variant == "bounded":
        assert 0 < abs(metrics[3]["loss/xpo"]) < alpha / (2 * beta)


def test_second_temperature_is_that_of_candidate_1_among_several(every_pair, run):
    hot = run("all_hot_second", loss__candidates=3, loss__pairing="all", sampling__second_temperature=4.0)
    plain, mixed = ([p for p in pairs_of(path) if p["step"] == 0] for path in (every_pair, hot))
    for i in range(0, len(plain), 6):
        same = [
            a["text"] == b["text"]
            for a, b in zip(plain[i]["candidates"], mixed[i]["candidates"], strict=True)
        ]
        assert same[0] and same[2] and same[3]
    assert [p["candidates"][1]["text"] for p in plain[::6]] != [
        p["candidates"][1]["text"] for p in mixed[::6]
    ]


@pytest.mark.parametrize("second", ["reference", "policy"])
def test_second_temperature_is_that_of_the_second_candidate_alone(run, second):
    """In training; evaluations, and log-probabilities, keep the temperature of the others."""

    def first_step(name, **changes):
        path = run(f"{name}_{second}", loss__second_candidate=second, judging__both_orders=True, **changes)
        evaluations = [row for row in read_metrics(path) if "eval/win_rate" in row]
        return [pair for pair in pairs_of(path) if pair["step"] == 0], evaluations[0], read_metrics(path)[1]

    plain, evaluation, _ = first_step("plain")
    hot, same_evaluation, metrics = first_step("hot", sampling__second_temperature=4.0)
    all_hot = first_step("all_hot", sampling__temperature=4.0)[0]
    assert [tokens(pair)[0] for pair in hot] == [tokens(pair)[0] for pair in plain]
    assert [tokens(pair)[1] for pair in hot] == [tokens(pair)[1] for pair in all_hot]
    assert [tokens(pair)[1] for pair in hot] != [tokens(pair)[1] for pair in plain]
    assert same_evaluation["eval/win_rate"] == evaluation["eval/win_rate"]
    for pair, other in zip(hot, plain, strict=True):
        assert pair["ref_logps"][0] == pytest.approx(other["ref_logps"][0], rel=1e-5)
    assert metrics["rewards/margins"] == 0 and metrics["objective/kl"] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"sampling__second_temperature": 0.0},
            "sampling.second_temperature is 0.0, must be positive, or None for that of the others",
        ),
        (
            {"sampling__second_temperature": 2.0, "offline": {"pairs": "pairs.jsonl"}},
            "sampling.second_temperature is 2.0, but offline names recorded pairs, and nothing is sampled",
        ),
        ({"loss__candidates": 3}, "loss.pairing is None, but candidates is 3; name a rule"),
        (
            {"loss__pairing": "uncertain"},
            "loss.pairing is 'uncertain', but candidates is 1: there is one pair",
        ),
        ({"loss__candidates": 0}, "loss.candidates is 0, must be at least 1"),
        ({"loss__candidates": 2, "loss__pairing": "best"}, "loss.pairing: 'best_worst' or 'best_quantile'"),
        (
            {"loss__candidates": 2, "loss__pairing": "all", "judge__name": "fakes:LongerText"},
            "loss.pairing: 'all' needs a judge that scores every answer by itself",
        ),
        (
            {"loss__candidates": 2, "loss__pairing": "all", "judging__both_orders": True},
            "judging.both_orders is True, but with loss.pairing='all' every answer is scored by itself",
        ),
        (
            {"loss__candidates": 2, "loss__pairing": "all", "judging__max_queries": 89},
            "a step 24: set it to at least 112",
        ),
    ],
)
def test_setting_that_does_not_fit_is_refused_in_one_line(folder, changes, words):
    config = changed_config(folder, **{"judge__name": "fakes:Scoring", **changes})
    status, _, err = run_name(folder, "refused", config)
    assert status == 2 and words in err and err.count("\n") == 1, err
    assert not (folder / "refused").exists()
