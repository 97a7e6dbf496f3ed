"""Prefetched samples of the reference, several steps in one call, equal those of one step at a time."""

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_run import changed_config, killed_at_update, one_device, one_sequence_length, read_metrics, run_name

from xpo_jax.algorithm import prefetch
from xpo_jax.algorithm.prefetch import ReferencePrefetcher, concat_batches
from xpo_jax.checkpointing import checkpoint
from xpo_jax.experiment.setup import prepare
from xpo_jax.models.hf import model_folder
from xpo_jax.runtime.rng import Stream

pytestmark = pytest.mark.usefixtures("shared_programs")
STEPS = 5


def changed(folder, changes):
    return changed_config(folder, **{"steps": STEPS, **changes})


# ---- groups -------------------------------------------------------------------------------------


class Counting:
    """Fake programs and batches: a sample is the step and the position of its row."""

    def __init__(self, k, B=2):
        self.shapes, self.calls = SimpleNamespace(prefetch_depth=k, batch_size=B), []

    def __getitem__(self, step):
        rows = np.arange(self.shapes.batch_size, dtype=np.int32)
        width = 3 + step % 2
        tokens = np.full((self.shapes.batch_size, width), 10 + step, np.int32)
        valid = np.ones(self.shapes.batch_size, bool)
        return prefetch.Prompts(({},) * 2, ((),) * 2, tokens, rows + 1, rows, valid)

    def sample(self, weights, prompts, *, stream, step, candidate):
        self.calls.append((weights, prompts, (stream, candidate), step.tolist()))
        return prefetch.Samples(prompts.tokens, step, prompts.valid)

    def fetch(self, samples):
        return samples


def groups(k, steps, every=None):
    """Return each step's group, and the weights and steps of each call, of a run that renews its reference."""
    fake = Counting(k)
    since = lambda done: done - done % every if every else 0
    prefetcher = ReferencePrefetcher(fake, fake, steps, since, stream=Stream.TRAINING, candidate=1)
    for step in range(steps):
        prefetcher.dispatch(f"of {since(step)}", step)
        samples = prefetcher.take(step)
        assert samples.lengths.tolist() == [step] * 2 and (samples.tokens[:, 0] == 10 + step).all()
        assert samples.finished.all()
        if since(step + 1) == since(step):
            prefetcher.dispatch(f"of {since(step)}", step + 1)
    return [list(prefetcher.group(step)) for step in range(steps)], fake.calls


def test_prefetcher_groups_and_calls_by_hand():
    step_groups, calls = groups(3, 5)
    assert step_groups == [[0, 1, 2]] * 3 + [[3, 4]] * 2
    assert [steps for *_, steps in calls] == [[0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5]]
    assert calls[1][1].valid.tolist() == [True] * 4 + [False] * 2  # past the last step
    assert calls[0][1].tokens.shape == calls[1][1].tokens.shape == (6, 4)
    assert calls[0][1].position.tolist() == [0, 1] * 3 and calls[0][2] == (1, 1)


def test_prefetcher_group_ends_at_a_renewal():
    step_groups, calls = groups(2, 7, every=3)
    assert step_groups == [[0, 1], [0, 1], [2], [3, 4], [3, 4], [5], [6]]
    assert [weights for weights, *_ in calls] == ["of 0", "of 0", "of 3", "of 3", "of 6"]


def test_prefetcher_of_depth_1_calls_once_per_step():
    step_groups, calls = groups(1, 3)
    assert step_groups == [[0], [1], [2]] and [steps for *_, steps in calls] == [[0, 0], [1, 1], [2, 2]]


def test_concat_batches_keeps_each_batch():
    narrow, wide = Counting(1)[0], Counting(1)[1]
    both = concat_batches([narrow, wide])
    np.testing.assert_array_equal(both.tokens[:2, :3], narrow.tokens)
    np.testing.assert_array_equal(both.tokens[2:], wide.tokens)
    assert both.lengths.tolist() == [1, 2, 1, 2] and len(both.rows) == len(both.messages) == 4


# ---- samples ------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [one_device, contextlib.nullcontext])
def test_prefetcher_samples_equal_those_of_single_steps(folder, devices):
    """The group has batches of different buckets, and a partial batch."""
    with devices():
        p = prepare(changed(folder, {"layout__reference_steps": 3}))
    for label, compile_program in p.programs.declared_programs():
        if label.split()[0] in ("sample", "ahead", "init", "for_sampling"):
            compile_program()
    weights = p.programs.for_sampling(
        model_folder.load_params(
            p.models.policy.folder, p.models.config, shardings=p.programs.model.params_sharding
        )
    )
    prefetcher = ReferencePrefetcher(
        p.programs, p.data.batches, STEPS, lambda done: 0, stream=Stream.TRAINING, candidate=1
    )
    widths = {p.data.batches[step].tokens.shape[1] for step in range(STEPS)}
    assert len(widths) == 2
    for step in range(STEPS):
        prefetcher.dispatch(weights, step)
        alone = p.programs.sample(
            weights, p.data.batches[step], stream=Stream.TRAINING, step=step, candidate=1
        )
        for prefetched, expected in zip(prefetcher.take(step), p.programs.fetch(alone), strict=True):
            np.testing.assert_array_equal(prefetched, expected)


# ---- runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(folder):
    """Return a function that runs a config under a name and returns what the run leaves, except timings."""

    def go(name, **changes):
        config = changed(folder, {"evaluation__prompts": 8, "evaluation__reference_samples": 1, **changes})
        with one_device(), one_sequence_length():
            status, _, err = run_name(folder, name, config)
        assert status == 0, err
        result = json.loads((folder / name / "result.json").read_text())
        assert result["compilations_during_run"] == 0
        return {
            "metrics": read_metrics(folder / name),
            "pairs": (folder / name / "pairs.jsonl").read_text(),
            "declared": result["compilations_declared"],
        }

    return go


@pytest.fixture(scope="module")
def alone(run):
    return run("alone")


def drawn(results):
    return [
        [response["tokens"] for response in json.loads(line)["responses"]]
        for line in results["pairs"].splitlines()
    ]


@pytest.mark.slow
def test_resume_within_a_group_gives_the_same_bits(run, alone, folder):
    whole = run("whole", layout__reference_steps=3, checkpoint__every_steps=1)
    assert drawn(whole) == drawn(alone)
    assert whole["declared"] == alone["declared"] + 2  # a wider sampler for each of two buckets
    with killed_at_update(2):
        run("killed", layout__reference_steps=3, checkpoint__every_steps=1)
    assert checkpoint.latest(folder / "killed" / "checkpoints") == 2  # the group is of steps 0, 1 and 2
    assert run("killed", layout__reference_steps=3, checkpoint__every_steps=1) == whole


@pytest.mark.slow
def test_online_dpo_prefetches_nothing(run):
    changes = {"loss__second_candidate": "policy", "loss__alpha": 0.0, "steps": 2}
    assert run("dpo", **changes) == run("dpo_ahead", layout__reference_steps=2, **changes)


def test_prepare_reference_steps_below_1_is_refused(folder):
    with pytest.raises(ValueError, match=r"layout.reference_steps is 0, must be at least 1"):
        prepare(changed(folder, {"layout__reference_steps": 0}))
