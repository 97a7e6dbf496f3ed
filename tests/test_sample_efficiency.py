"""Where exploration pays: the bandit's optimum, its judge and its gradient against closed forms, the intervals by
simulation, and the experiment itself in its quick form."""

import functools
import json
import math
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tools import sample_efficiency
from tools.intervals import Censored, Estimate, median, ratio, reached
from tools.research import bandit, bandit_cases

ROOT = Path(__file__).parents[1]
RARE = bandit.make_bandit(0.01, beta=0.2)


def a_run(
    *,
    seed=0,
    alpha=0.0,
    temperature=1.0,
    second=None,
    on_policy=False,
    fading=np.inf,
    fresh=False,
    known=RARE,
):
    return bandit.Run(
        known,
        jnp.float32(alpha),
        jnp.float32(temperature),
        jnp.float32(second or temperature),
        jnp.bool_(on_policy),
        jnp.float32(fading),
        jnp.bool_(fresh),
        jnp.int32(seed),
    )


@functools.partial(jax.jit, static_argnames=("optimizer", "pairs"))
def one_round(run, learner, index, optimizer, pairs):
    return bandit.play(optimizer, pairs, 1, run, learner, index)[0]


ADAM, STILL = bandit.adam(0.1), bandit.adam(1e-6)


def after(run, rounds, pairs=4, optimizer=ADAM, policy=None):
    """Return the learner after some rounds of one update each; it starts as the reference or with these logits."""
    learner = bandit.start(optimizer, run)
    if policy is not None:
        learner = learner._replace(params={"logits": jnp.float32(policy)})
    for index in range(rounds):
        learner = one_round(run, learner, index, optimizer, pairs)
    return jax.device_get(learner)


# ---- the bandit -------------------------------------------------------------------------------------


def test_make_bandit_by_hand():
    np.testing.assert_allclose(RARE.reference, [0.92 / 5] * 5 + [0.01] * 8, rtol=1e-6)
    np.testing.assert_allclose(RARE.rewards, [0.5, 0.625, 0.75, 0.875, 1, 3] + [0] * 7)
    common = bandit.make_bandit(0.001, beta=0.2, best="common", junk=50)
    np.testing.assert_allclose(common.reference, [0.942 / 5] * 5 + [0.001] * 58, rtol=1e-6)
    np.testing.assert_allclose(common.rewards, [0.5, 0.625, 0.75, 0.875, 3] + [0] * 58)
    np.testing.assert_allclose(bandit.make_bandit(0, beta=0.2, uniform=True).reference, 1 / 13, rtol=1e-6)


def test_optimum_has_the_largest_value():
    reference, rewards = np.float64(RARE.reference), np.float64(RARE.rewards)
    best = bandit.value(RARE, bandit.optimum(RARE))
    # J(pi*) = beta log E_ref[exp(r / beta)]
    np.testing.assert_allclose(best, 0.2 * np.log(np.sum(reference * np.exp(rewards / 0.2))), rtol=1e-6)
    np.testing.assert_allclose(
        bandit.value(RARE, jnp.log(RARE.reference)), np.sum(reference * rewards), rtol=1e-6
    )
    # rarer, so that the optimum is not almost all on the best arm, and float32 resolves the cost of a change
    rarer, rng = bandit.make_bandit(1e-6, beta=0.2), np.random.default_rng(0)
    best = bandit.value(rarer, bandit.optimum(rarer))
    for scale in (0.1, 1, 5):
        noise = rng.normal(scale=scale, size=13)
        assert bandit.value(rarer, jax.nn.log_softmax(bandit.optimum(rarer) + noise)) < best - 1e-4


def test_loss_is_that_of_the_pairs_one_by_one():
    """Pairs are counted by their arms, and Algorithm 1 is written out over a list of pairs, in float64."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 13, (2, 60))
    won = np.where(first == second, 0.5, rng.integers(0, 2, 60))
    counts, wins = np.zeros((2, 13, 13), np.float32)
    np.add.at(counts, (first, second), 1)
    np.add.at(wins, (first, second), won)
    logits = rng.normal(size=13)
    alpha, beta = 0.02, 0.2

    def written_out(logits):
        logps = logits - np.log(np.exp(logits).sum())
        implicit = beta * (logps - np.log(np.float64(RARE.reference)))
        z = implicit[first] - implicit[second]
        preference = won * np.log1p(np.exp(-z)) + (1 - won) * np.log1p(np.exp(z))
        return np.mean(preference + alpha * logps[second])

    run = a_run(alpha=alpha)
    value_and_grad = jax.value_and_grad(
        lambda x: bandit.loss({"logits": x}, run, jnp.asarray(counts), jnp.asarray(wins))
    )
    loss, grad = value_and_grad(jnp.float32(logits))
    np.testing.assert_allclose(loss, written_out(logits), rtol=1e-5)
    steps = np.eye(13) * 1e-5
    slopes = [(written_out(logits + step) - written_out(logits - step)) / 2e-5 for step in steps]
    np.testing.assert_allclose(grad, slopes, atol=1e-6)


def test_play_only_the_bonus_moves_an_arm_that_was_never_drawn():
    """Without it the arm keeps its logit, with it the logit rises and with the wrong sign it falls."""
    unseen = {}
    for alpha in (0.0, 0.02, -0.02):
        learner = after(a_run(alpha=alpha, known=bandit.make_bandit(1e-6, beta=0.2)), rounds=5)
        assert learner.counts[:, 5:].sum() == learner.counts[5:].sum() == 0
        unseen[alpha] = learner.params["logits"][5:] - np.log(1e-6)
    # Adam turns any gradient into up to 0.1 per update, and the rounding in the softmax may be a gradient
    assert np.abs(unseen[0.0]).max() < 0.01
    assert unseen[0.02].min() > 0.2 and unseen[-0.02].max() < -0.2


def test_play_draws_and_judges_by_the_stated_probabilities():
    n = 20_000
    learner = after(a_run(), rounds=1, pairs=n, optimizer=STILL)
    counts, wins = np.float64(learner.counts), np.float64(learner.wins)
    reference, rewards = np.float64(RARE.reference), np.float64(RARE.rewards)
    for axis in (0, 1):  # at the start both candidates are the reference's
        np.testing.assert_allclose(counts.sum(axis) / n, reference, atol=0.01)
    assert learner.queries == counts.sum() - np.trace(counts)  # identical arms tie without a query
    np.testing.assert_array_equal(np.diag(wins), np.diag(counts) / 2)
    p = 1 / (1 + np.exp(rewards[None, :] - rewards[:, None]))
    z = (wins - counts * p) / np.sqrt(np.maximum(counts * p * (1 - p), 1e-9))
    judged = (counts > 100) & ~np.eye(13, dtype=bool)
    assert judged.sum() >= 20 and np.abs(z[judged]).max() < 4  # Bradley-Terry's judge

    warm = after(a_run(temperature=2.0), rounds=1, pairs=n, optimizer=STILL).counts
    for axis in (0, 1):
        np.testing.assert_allclose(
            warm.sum(axis) / n, np.sqrt(reference) / np.sqrt(reference).sum(), atol=0.01
        )

    warm = after(a_run(second=2.0), rounds=1, pairs=n, optimizer=STILL).counts
    np.testing.assert_allclose(warm.sum(1) / n, reference, atol=0.01)
    np.testing.assert_allclose(warm.sum(0) / n, np.sqrt(reference) / np.sqrt(reference).sum(), atol=0.01)

    # far from the reference: the policy samples one candidate, or both
    for on_policy, expected in ((False, reference[5]), (True, 1.0)):
        run, policy = a_run(on_policy=on_policy), np.where(np.arange(13) == 5, 50.0, 0.0)
        counts = after(run, rounds=1, pairs=n, optimizer=STILL, policy=policy).counts
        assert counts[5].sum() == n
        np.testing.assert_allclose(counts[5, 5] / n, expected, atol=0.01)


def test_fresh_pairs_are_those_of_the_last_round():
    replayed, fresh = (after(a_run(fresh=fresh), rounds=3) for fresh in (False, True))
    assert (replayed.counts.sum(), fresh.counts.sum()) == (12, 4)
    assert 4 < fresh.queries <= 12  # verdicts are counted all the same
    only_last = one_round(a_run(), after(a_run(fresh=True), rounds=2)._replace(counts=0, wins=0), 2, ADAM, 4)
    np.testing.assert_array_equal(fresh.params["logits"], only_last.params["logits"])


def test_alpha_falls_to_0_over_the_rounds_and_the_loss_of_a_pair_is_a_choice():
    counts, wins = jnp.ones((13, 13)), jnp.full((13, 13), 0.5)
    params = {"logits": jnp.arange(13.0)}

    def loss(alpha, **options):
        fading = options.pop("fading", np.inf)
        return float(bandit.loss(params, a_run(alpha=alpha, fading=fading), counts, wins, **options))

    without, bonus = loss(0.0), loss(0.04) - loss(0.0)
    assert abs(bonus) > 0.01 and loss(0.04, index=1000) == loss(0.04)
    for index, factor in ((0, 1), (2, 0.5), (4, 0), (9, 0)):
        assert loss(0.04, fading=4.0, index=index) - without == pytest.approx(factor * bonus, abs=1e-6)
    ratio = 0.2 * (jax.nn.log_softmax(params["logits"]) - np.log(RARE.reference))
    expected = 0.04 * np.mean(1 / (1 + np.exp(-np.float64(ratio))) - 0.5) / 0.2
    bounded = loss(0.04, of_pairs=bandit_cases.LOSSES["bounded"]) - without
    assert bounded == pytest.approx(expected, abs=1e-6)


def test_simulate_runs_are_independent():
    """A run is the same alone and among others, and differs from those with another seed."""
    runs = [a_run(seed=seed, alpha=alpha) for seed in (0, 1) for alpha in (0.0, 0.02)]
    settings = {"pairs": 4, "updates": 1, "rounds": bandit.CHUNK}
    jointly = bandit.simulate(runs, bandit.adam(0.1), **settings)
    alone = bandit.simulate(runs[2:3], bandit.adam(0.1), **settings)
    np.testing.assert_array_equal(jointly.queries[2], alone.queries[0])
    np.testing.assert_allclose(jointly.value[2], alone.value[0], atol=1e-4)
    assert np.abs(jointly.value[0] - jointly.value[2]).max() > 0.1
    with pytest.raises(ValueError, match=r"rounds is 63.*multiple of 64"):
        bandit.simulate(runs, bandit.adam(0.1), pairs=4, updates=2, rounds=63)


def test_progress_and_regret_by_hand():
    low, high = bandit.ends(RARE)
    way = high - low
    curve = bandit.Curve(low + way * np.array([[0.5, 1.0, 1.0]]), np.array([[4, 6, 10]]))
    np.testing.assert_allclose(bandit.progress_to_optimum(RARE, curve), [[0.5, 1, 1]])
    # 4 verdicts at the reference's value, 2 halfway, 4 at the optimum
    np.testing.assert_allclose(bandit.regret(RARE, curve), [4 * way + 2 * way / 2])


# ---- intervals --------------------------------------------------------------------------------------


def test_reached_first_and_sustained():
    at_goal = np.bool_([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0]])
    queries = np.tile([4, 8, 11, 15, 19], (4, 1))
    first, last = (reached(at_goal, queries, sustained=sustained) for sustained in (False, True))
    np.testing.assert_array_equal(first.at_least, [8, 19, 4, 8])
    np.testing.assert_array_equal(first.at_most, [8, np.inf, 4, 8])
    np.testing.assert_array_equal(last.at_least, [15, 19, 4, 19])
    np.testing.assert_array_equal(last.at_most, [15, np.inf, 4, np.inf])


def known(*values):
    return Censored(np.float64(values), np.float64(values))


def test_median_of_censored_runs_is_a_bound():
    never = Censored(np.full(5, 100.0), np.full(5, np.inf))
    assert median(known(1, 2, 3, 4, 90))[:2] == (3, 3)
    assert median(never) == (100, np.inf, 100, np.inf)
    assert ratio(never, known(*[4] * 5)) == (25, np.inf, 25, np.inf)
    assert ratio(known(*[4] * 5), never) == (0, 0.04, 0, 0.04)
    assert ratio(never, never) == (0, np.inf, 0, np.inf)
    # one of five censored: the median is known, but not every resample's
    partly = Censored(np.float64([1, 2, 3, 4, 90]), np.float64([1, 2, 3, 4, np.inf]))
    assert median(partly)[:2] == (3, 3) and median(partly).high == np.inf
    shown = [
        str(Estimate(*bounds)) for bounds in ((3, 3, 1, 1234), (25, np.inf, 9, np.inf), (0, 0.04, 0, 0.05))
    ]
    assert shown == ["3 [1, 1234]", "> 25 [9, inf]", "< 0.04 [0, 0.05]"]
    assert str(Estimate(0, np.inf, 0, np.inf)) == "- [0, inf]"


def test_ratio_resamples_seeds_jointly():
    """If both arms are lucky with the same seeds, their ratio is certain."""
    base = known(*np.random.default_rng(0).exponential(size=24))
    assert ratio(base, known(*base.at_least / 3)) == pytest.approx((3, 3, 3, 3))


@pytest.mark.parametrize("seeds", [12, 32])
def test_intervals_cover_the_truth_at_their_level(seeds):
    """95 % intervals hold the truth in 93 to 97 of 100 experiments, for waiting times with a long tail."""
    rng, medians, ratios, n = np.random.default_rng(1), 0, 0, 1000
    waiting = lambda scale: known(*(scale * (20 + rng.exponential(100, seeds))))
    truth = 20 + 100 * math.log(2)
    for _ in range(n):
        base, other = waiting(1.0), waiting(0.125)
        estimate, of_ratio = median(base), ratio(base, other)
        medians += estimate.low <= truth <= estimate.high
        ratios += of_ratio.low <= 8 <= of_ratio.high
    assert 0.93 <= medians / n <= 0.97
    assert 0.93 <= ratios / n <= 0.97


# ---- the experiment ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick_curves():
    """The simulation, optimized: it is one of the few programs here whose run takes longer than its compilation."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield bandit_cases.simulate(bandit_cases.cases(quick=True), seeds=12, rounds=1024)
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def quick(quick_curves):
    """The rows of the quick form by setting and arm."""
    rows = sample_efficiency.evaluate(bandit_cases.cases(quick=True), quick_curves)
    return {(row["setting"], row["arm"]): row for row in rows}


@pytest.mark.parametrize("arm", ["alpha/beta 0.02", "alpha/beta 0.1"])
def test_the_bonus_pays_where_the_best_arm_is_rare(quick, arm):
    row = quick["rare mass 0.001", arm]
    for kind in ("ratio_first", "ratio_sustained"):
        assert row[kind].at_least >= 3, kind
        assert row[kind].low > 1, kind  # the complete interval, not just its middle
    assert row["solved_at_end"] == 1


@pytest.mark.parametrize("arm", ["alpha/beta 0.02", "alpha/beta 0.1"])
def test_and_not_where_the_reference_covers_all_alike(quick, arm):
    row = quick["uniform reference", arm]
    assert 0.6 <= row["ratio_first"].at_least == row["ratio_first"].at_most <= 1.6
    assert row["ratio_first"].low < 1 < row["ratio_first"].high


@pytest.mark.parametrize("arm", ["wrong sign, -0.02", "wrong sign, -0.1"])
def test_and_with_the_wrong_sign_it_costs(quick, arm):
    row = quick["rare mass 0.001", arm]
    assert row["ratio_first"].at_most < 1 and row["ratio_first"].high < 1


def test_every_setting_begins_with_what_it_is_compared_to():
    for all_cases in (
        bandit_cases.cases(quick=False),
        bandit_cases.rate_cases(),
        bandit_cases.factor_cases(),
    ):
        firsts = {}
        for case in all_cases:
            firsts.setdefault(case.setting, case)
        assert {first.arm for first in firsts.values()} == {"alpha/beta 0"}
        for case in all_cases:  # and a setting is one bandit and one optimizer
            base = firsts[case.setting]
            assert (case.bandit, case.optimizer, case.learning_rate) == (
                base.bandit,
                base.optimizer,
                base.learning_rate,
            )
        assert len({(case.setting, case.arm) for case in all_cases}) == len(all_cases)


# ---- the command ------------------------------------------------------------------------------------


def test_the_files_and_the_figure(quick_curves, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    calls = []
    monkeypatch.setattr(sample_efficiency, "simulate", lambda _, **given: calls.append(given) or quick_curves)
    for name in ("new", "again"):
        assert sample_efficiency.main(["--quick", f"--out={tmp_path / name}"]) == 0
    assert calls == [{"seeds": 12, "rounds": 1024}] * 2
    out = capsys.readouterr().out
    assert "wrong sign, -0.1" in out and "Times fewer verdicts" in out
    written = json.loads((tmp_path / "new" / "results.json").read_text())
    assert written["about"]["seeds"] == 12 and len(written["rows"]) == 8
    row = written["rows"][4]  # with the wrong sign and 0.1 beta no run reaches the goal, and JSON has no inf
    assert (
        row["arm"] == "wrong sign, -0.1"
        and row["first"]["at_least"] > 3000
        and row["first"]["at_most"] is None
    )
    svg, again = ((tmp_path / name / "sample_efficiency.svg").read_bytes() for name in ("new", "again"))
    assert svg == again and svg.count(b"uniform reference; alpha/beta 0.02") == 1


def test_without_matplotlib_a_figure_is_refused_before_the_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sample_efficiency, "simulate", lambda *_, **__: pytest.fail("it ran"))
    assert sample_efficiency.main([f"--out={tmp_path / 'new'}"]) == 2
    assert "pip install 'xpo-jax[report]'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--quik"], "unrecognized arguments: --quik"),
        (["--rates", "--quick"], "--rates cannot be combined"),
        (["--rates", "--factors"], "--rates cannot be combined"),
    ],
)
def test_main_invalid_input_is_one_line(argv, message, capsys):
    assert sample_efficiency.main(argv) == 2
    assert message in capsys.readouterr().err


def test_the_document_shows_every_arm():
    """Its table is the command's, with a line for each setting and arm, and its figure is beside it."""
    text = (ROOT / "docs" / "sample_efficiency.md").read_text(encoding="utf-8")
    lines = {tuple(re.split(r"  +", line)[:2]) for line in text.splitlines()}
    all_cases = [*bandit_cases.cases(quick=False), *bandit_cases.factor_cases()]
    assert [c for c in all_cases if (c.setting, c.arm) not in lines] == []
    figures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert figures and all((ROOT / "docs" / figure).is_file() for figure in figures)
