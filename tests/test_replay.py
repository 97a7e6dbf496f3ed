"""The replay buffer: what it keeps and samples; runs that replay, renew their reference, and are interrupted."""

import json

import jax
import numpy as np
import pytest
from fakes import Counting
from shared_fixtures import STEPS
from tiny_run import changed_config, killed_at_update, run_contents, write_config

from xpo_jax.algorithm.programs import Programs
from xpo_jax.algorithm.replay_buffer import ReplayBuffer
from xpo_jax.config import loader as configs
from xpo_jax.experiment import setup
from xpo_jax.values import Pairs

pytestmark = pytest.mark.usefixtures("one_device")
B = 4


# ---- the memory -----------------------------------------------------------------------------------


def memory(updates=3, capacity=100, seed=5):
    return ReplayBuffer(updates=updates, capacity=capacity, batch_size=B, seed=seed, pad_token=0)


def pairs_of(step, weight=(1, 1, 1, 1), valid=(True,) * 4, width=8):
    """Return four pairs whose tokens identify them: all tokens of row i of a step are 10 * step + i + 1."""
    mark = 10 * step + np.arange(B, dtype=np.int32) + 1
    return Pairs(
        prompt_tokens=np.repeat(mark[:, None], width, 1),
        prompt_lengths=np.array([1, 3, 4, width], np.int32),
        tokens=np.stack([np.repeat(mark[:, None], 6, 1)] * 2),
        lengths=np.array([[1, 2, 3, 6], [2, 2, 1, 1]], np.int32),
        ref_logps=np.stack([-mark / 8, -mark / 16]).astype(np.float32),
        p_first=mark.astype(np.float32) / 64,
        weight=np.array(weight, np.float32),
        valid=np.array(valid),
    )


def rows(pairs):
    """Return the valid rows without padding, by mark; check that padding holds the pad token."""
    by_mark = {}
    for i in np.flatnonzero(pairs.valid):
        prompt = pairs.prompt_tokens[i]
        length = pairs.prompt_lengths[i]
        answers = [pairs.tokens[s, i, : pairs.lengths[s, i]].tolist() for s in (0, 1)]
        assert not prompt[length:].any()
        assert not any(pairs.tokens[s, i, pairs.lengths[s, i] :].any() for s in (0, 1))
        numbers = (*pairs.ref_logps[:, i].tolist(), float(pairs.p_first[i]), float(pairs.weight[i]))
        assert int(prompt[0]) not in by_mark, "drawn twice for one update"
        by_mark[int(prompt[0])] = (prompt[:length].tolist(), answers, numbers)
    return by_mark


def width_of(pairs):
    return pairs.prompt_tokens.shape[1]


def cut(mark, i):
    """Return row i of a step as the buffer should return it."""
    lengths = [1, 3, 4, 8][i], [1, 2, 3, 6][i], [2, 2, 1, 1][i]
    prompt, *answers = ([mark] * length for length in lengths)
    return prompt, answers, (-mark / 8, -mark / 16, mark / 64, 1.0)


def test_minibatches_are_complete_past_pairs():
    buffer = memory()
    fresh = pairs_of(0)
    more = list(buffer.minibatches(0, fresh))
    assert len(more) == 2 and len(buffer) == 4
    for drawn in more:  # there are no past pairs yet: all four, once each, in some order
        assert rows(drawn) == {i + 1: cut(i + 1, i) for i in range(4)}
    seen = {}
    for step in range(1, 6):
        for drawn in buffer.minibatches(step, pairs_of(step)):
            seen |= rows(drawn)
            assert len(rows(drawn)) == B
    assert len(buffer) == 24
    assert seen == {mark: cut(mark, mark % 10 - 1) for mark in seen} and len(seen) > 15


def test_minibatches_are_as_wide_as_their_longest_pair():
    buffer = memory(updates=2)
    only_short = pairs_of(0, weight=(1, 1, 1, 0))
    (drawn,) = buffer.minibatches(0, only_short)
    assert (width_of(drawn), drawn.tokens.shape) == (4, (2, B, 3))
    assert drawn.valid.tolist() == [True, True, True, False]
    buffer = memory(updates=2)
    (drawn,) = buffer.minibatches(0, pairs_of(0))
    assert (width_of(drawn), drawn.tokens.shape) == (8, (2, B, 6))


def test_buffer_keeps_only_the_newest_pairs_with_a_verdict():
    buffer = memory(updates=2)
    list(buffer.minibatches(0, pairs_of(0, weight=(1, 0, 1, 1), valid=(True, True, True, False))))
    assert len(buffer) == 2
    nothing = memory()
    assert list(nothing.minibatches(0, pairs_of(0, weight=(0, 0, 0, 0)))) == []  # no update on nothing
    fresh_only = memory(updates=1)
    assert list(fresh_only.minibatches(0, pairs_of(0))) == [] and len(fresh_only) == 0
    small = memory(updates=2, capacity=6)
    for step in range(3):
        list(small.minibatches(step, pairs_of(step)))
    marks = set()
    for step in range(3, 40):
        (drawn,) = small.minibatches(step, pairs_of(2, weight=(0,) * 4))
        marks |= set(rows(drawn))
    assert marks == {13, 14, 21, 22, 23, 24}  # the newest six


def test_minibatches_are_uniform_and_depend_on_seed_step_and_update():
    counts, buffer = dict.fromkeys(range(1, 5), 0) | dict.fromkeys(range(11, 15), 0), memory(updates=2)
    list(buffer.minibatches(0, pairs_of(0)))
    list(buffer.minibatches(1, pairs_of(1)))
    none = pairs_of(0, weight=(0,) * 4)
    for step in range(2, 2002):
        (drawn,) = buffer.minibatches(step, none)
        for mark in rows(drawn):
            counts[mark] += 1
    assert sum(counts.values()) == 8000
    assert all(abs(count - 1000) < 5 * np.sqrt(500) for count in counts.values())  # binomial(2000, 1/2)
    orders = []
    for seed, step in ((5, 7), (5, 7), (5, 8), (6, 7)):
        other = memory(updates=3, seed=seed)
        list(other.minibatches(0, pairs_of(0)))
        list(other.minibatches(1, pairs_of(1)))
        drawn = other.minibatches(step, none)
        orders.append([list(rows(minibatch)) for minibatch in drawn])
    assert orders[0] == orders[1] and orders[0][0] != orders[0][1]
    assert orders[0] != orders[2] and orders[0] != orders[3]


def test_refill_gives_the_same_minibatches():
    buffer, refilled = memory(capacity=10), memory(capacity=10)
    records = []
    for step in range(4):
        weight = (1, 0, 1, 1) if step == 2 else (1, 1, 1, 1)
        fresh = pairs_of(step, weight)
        for i in range(B):
            answers = [fresh.tokens[s, i, : fresh.lengths[s, i]].tolist() for s in (0, 1)]
            records.append(
                {
                    "step": step,
                    "position": i,
                    "prompt_tokens": fresh.prompt_tokens[i, : fresh.prompt_lengths[i]].tolist(),
                    "responses": [{"tokens": tokens} for tokens in answers],
                    "p_first": float(fresh.p_first[i]) if weight[i] else None,
                    "weight": float(weight[i]),
                    "ref_logps": fresh.ref_logps[:, i].tolist(),
                }
            )
        list(buffer.minibatches(step, fresh))
    refilled.refill(lambda: records[::-1])
    assert len(refilled) == len(buffer) == 10
    none = pairs_of(0, weight=(0,) * 4)
    for minibatch, refilled_minibatch in zip(
        buffer.minibatches(9, none), refilled.minibatches(9, none), strict=True
    ):
        jax.tree.map(np.testing.assert_array_equal, minibatch, refilled_minibatch)
    memory(updates=1).refill(lambda: pytest.fail("read for nothing"))
    for name in ("ref_logps", "prompt_tokens"):  # a log of an older version
        del records[-1][name]
        with pytest.raises(ValueError, match=f"step 3 of the pairs log has no {name}.*replay.updates=1"):
            memory().refill(lambda: records)


# ---- a run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replaying(run, folder):
    """Return the files of an uninterrupted run with three updates a step, the pairs of each update, and its queries."""
    seen, update = [], Programs.update

    def spy(self, state, frozen, pairs, packed, alpha, beta):
        seen.append((pairs, alpha))
        return update(self, state, frozen, pairs, packed, alpha, beta)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Programs, "update", spy)
        status, out, err, queries = run("replaying", replay__updates=3)
    assert status == 0, err
    assert "3 updates per step, all but one on the newest 1,000 pairs" in " ".join(out.split())
    return run_contents(folder / "replaying"), seen, queries


def test_replaying_run_updates_once_on_new_pairs_and_twice_on_all(replaying):
    contents, seen, _ = replaying
    assert len(seen) == 3 * STEPS and contents["result"]["updates"] == 3 * STEPS
    known = set()
    for number, (pairs, _) in enumerate(seen):
        now = {
            (
                tuple(pairs.prompt_tokens[i, : pairs.prompt_lengths[i]].tolist()),
                *(tuple(pairs.tokens[s, i, : pairs.lengths[s, i]].tolist()) for s in (0, 1)),
                *np.asarray(pairs.ref_logps)[:, i].tolist(),
                float(pairs.p_first[i]),
            )
            for i in np.flatnonzero(pairs.valid & (pairs.weight > 0))
        }
        if number % 3 == 0:
            known |= now
        assert now <= known and now
    logged = [json.loads(line) for line in contents["pairs"].splitlines()]
    logps = {tuple(map(float, np.float32(pair["ref_logps"]))) for pair in logged if pair["weight"]}
    assert logps == {pair[3:5] for pair in known}


def test_replaying_run_reports_replay_metrics(replaying):
    contents, _, _ = replaying
    rows = contents["metrics"][1:]
    pairs = [json.loads(line) for line in contents["pairs"].splitlines()]
    for row in rows:
        assert row["replay/pairs"] == sum(pair["step"] < row["step"] and pair["weight"] > 0 for pair in pairs)
        assert np.isfinite(row["replay/loss_total"]) and 0 <= row["replay/rewards_accuracies"] <= 1
    # the KL is that of the step's first update, which is on-policy
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert rows[1]["objective/kl"] != pytest.approx(0, abs=1e-5)
    # the learning rate falls over all updates, after one of warm-up
    rates = [row["learning_rate"] for row in rows]
    updates = 3 * np.arange(STEPS)
    assert rates == pytest.approx(1e-2 * np.minimum(1, (18 - updates) / 17), rel=1e-5)


@pytest.mark.parametrize("at", [7, pytest.param(15, marks=pytest.mark.slow)])
def test_replaying_run_resumed_gives_the_same_bits(run, folder, replaying, at):
    """The run is killed in the middle of a step, after one of its updates."""
    with killed_at_update(at):
        run(f"replaying_{at}", replay__updates=3)
    first = len(Counting.comparisons)
    status, out, err, second = run(f"replaying_{at}", replay__updates=3)
    assert status == 0, err
    assert f"after step {at // 6 * 2}, whose checkpoint is complete" in out
    assert run_contents(folder / f"replaying_{at}") == replaying[0] and first + second == replaying[2]


@pytest.mark.slow
def test_renewed_reference_is_the_policy_of_that_step(run, folder):
    """Right after a renewal the reference is the policy, so the KL of the logged log-probabilities is 0."""
    status, out, err, _ = run("renewed", model__reference_every_steps=3, evaluation__every_steps=0)
    assert status == 0, err
    assert "a frozen copy of it, renewed every 3 steps" in " ".join(out.split())
    renewed = run_contents(folder / "renewed")
    kl = [row["objective/kl"] for row in renewed["metrics"][1:]]
    assert [abs(value) < 1e-4 for value in kl] == [True, False, False, True, False, False]
    # steps 1 to 3 have the initial reference, as in a run that never renews it
    assert run("frozen", evaluation__every_steps=0)[0] == 0
    frozen = run_contents(folder / "frozen")
    assert renewed["metrics"][1:4] == frozen["metrics"][1:4] and renewed["metrics"][4] != frozen["metrics"][4]
    # the two newest, and the one whose policy is the reference
    assert sorted(int(f.name) for f in (folder / "renewed" / "checkpoints").iterdir()) == [3, 4, 6]

    with killed_at_update(5):
        run("renewed_5", model__reference_every_steps=3, evaluation__every_steps=0)
    status, out, err, _ = run("renewed_5", model__reference_every_steps=3, evaluation__every_steps=0)
    assert status == 0, err
    assert "after step 4" in out and run_contents(folder / "renewed_5") == renewed


# ---- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"replay.updates": 0}, "replay.updates is 0, must be at least 1"),
        ({"replay.capacity": 7}, "replay.capacity is 7, must be at least batch_size, 8"),
        (
            {"replay.updates": 2, "offline": {"pairs": "x"}},
            "replay.updates is 2, but offline names recorded pairs",
        ),
        (
            {"replay.updates": 2, "model.reference_every_steps": 2},
            "replay.updates is 2, but model.reference_every_steps is set",
        ),
        ({"model.reference_every_steps": 0}, "model.reference_every_steps is 0, must be 1 or more, or None"),
    ],
)
def test_prepare_conflicting_replay_settings_are_refused(folder, changes, text):
    config = changed_config(folder, **{name.replace(".", "__"): value for name, value in changes.items()})
    loaded = configs.load(str(write_config(folder / "refused.py", config)))
    with pytest.raises(ValueError, match=text.replace("(", r"\(")):
        setup.prepare(loaded)
