"""Whole runs of a tiny model: what they print and write, and an independent replay of the algorithm from the pairs log.

Every run goes through the command line, in this process. They share compiled programs, so that only the first of a
kind takes long.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fake_models import ENDS, SPEAKING, graphdef, write_model
from fakes import Patchy, Recording
from flax import nnx
from ml_collections import ConfigDict
from tiny_run import HELD_OUT_ROWS, TRAIN_ROWS, one_sequence_length, run_main, tiny_config, write_config

from xpo_jax.algorithm.optimizer import make_optimizer
from xpo_jax.algorithm.programs import Programs
from xpo_jax.algorithm.sampler import make_sampler, row_keys
from xpo_jax.algorithm.sampling import CandidateSampling
from xpo_jax.algorithm.update import init_state
from xpo_jax.checkpointing import checkpoint
from xpo_jax.data.pairs_log import read_pairs
from xpo_jax.models.decoder_family import unstack
from xpo_jax.models.hf import model_folder
from xpo_jax.runtime.compilation import CompilationCounter

pytestmark = pytest.mark.usefixtures("shared_programs")

STEPS, TEMPERATURE = 4, 0.9
RESULT = [
    "steps",
    "judge_queries",
    "win_rate",
    "win_rate_low",
    "win_rate_high",
    "win_rate_before",
    "valid",
    "valid_reference",
    "copy_rate",
    "copy_rate_reference",
    "kl",
    "seconds",
    "run_dir",
    "export",
]
METRICS = [
    "loss/dpo",
    "loss/xpo",
    "objective/kl",
    "objective/entropy",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/policy_chosen",
    "logps/policy_rejected",
    "logps/reference_chosen",
    "logps/reference_rejected",
    "judge/win_rate",
    "judge/tie_rate",
    "judge/failed_rate",
    "judge/queries",
    "time/sample",
    "time/judge",
    "time/update",
    "tokens_per_second",
    "alpha",
    "beta",
]


# ---- runs ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """A finished run: exit status, output, run directory, and the files that tests read."""

    path: Path
    status: int
    out: str
    err: str
    calls: list[Any]

    @property
    def result(self):
        def refuse(word):
            raise ValueError(f"{word} is not JSON")

        return json.loads(self.out.rstrip("\n").split("\n")[-1], parse_constant=refuse)

    @property
    def metrics(self):
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    @property
    def pairs(self):
        return list(read_pairs(self.path / "pairs.jsonl"))

    def files(self):
        return {
            str(file.relative_to(self.path)): (
                file.stat().st_mtime_ns,
                hashlib.sha256(file.read_bytes()).hexdigest(),
            )
            for file in self.path.rglob("*")
            if file.is_file()
        }


def tokens(pairs, candidate):
    return [pair["responses"][candidate]["tokens"] for pair in pairs]


def timeless(metrics):
    return [
        {k: v for k, v in row.items() if "time/" not in k and k != "tokens_per_second"} for row in metrics
    ]


@pytest.fixture(scope="module")
def run(folder):
    """Return a function that runs a changed tiny config in folder/name, with one sequence length or all three."""

    def start(name: str, *overrides: str, all_sequence_lengths: bool = False, **changes: Any) -> Run:
        config = tiny_config(folder)
        config.judge = ConfigDict({"name": "fakes:Patchy"})
        with config.unlocked(), config.ignore_type():
            config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
        config.run_dir = str(folder / name)
        Recording.calls.clear()
        spec = write_config(folder / f"{name}.py", config)
        with contextlib.nullcontext() if all_sequence_lengths else one_sequence_length():
            outcome = run_main([f"--config={spec}", *(f"--config.{override}" for override in overrides)])
        return Run(folder / name, *outcome, list(Recording.calls))

    return start


@pytest.fixture(scope="module")
def main_run(run):
    """Run XPO with a judge that sometimes has no verdict; JAX's caches are empty, so undeclared compilations count."""
    jax.clear_caches()
    done = run("main", all_sequence_lengths=True, logging__tensorboard=True)
    assert done.status == 0, done.err
    return done


# ---- what is printed and written ------------------------------------------------------------------


def test_run_last_line_is_the_result(main_run):
    result = main_run.result
    assert set(RESULT) <= set(result)
    assert result["steps"] == STEPS and result["skipped"] == 0
    assert result["run_dir"] == str(main_run.path) and result["export"] == str(main_run.path / "export")
    first, last = main_run.metrics[0], main_run.metrics[-1]
    for name in ("win_rate", "win_rate_low", "win_rate_high", "win_rate_controlled", "kl", "entropy"):
        assert result[name] == last[f"eval/{name}"], name
    assert result["win_rate_before"] == first["eval/win_rate"] != last["eval/win_rate"]
    assert result["judge_queries"] == last["judge/queries"]
    assert result["copy_rate"] is None  # this judge does not report it
    assert json.loads((main_run.path / "result.json").read_text()) == result
    numbers = [
        name
        for name in result
        if name not in ("run_dir", "export", "ended_by") and not name.startswith("copy_rate")
    ]
    assert result["ended_by"] == "steps"
    assert all(isinstance(result[name], int | float) for name in numbers)


def test_run_compiles_only_declared_programs(main_run):
    """The run includes evaluations, steps, a checkpoint and the export."""
    assert main_run.result["compilations_during_run"] == 0
    # init, for_sampling, fingerprint, zeros, apply; sample per prompt bucket; score, accumulate per width of rows
    assert main_run.result["compilations_declared"] == 5 + 2 + 2 * 3


def test_compilation_counter_counts_each_shape_once():
    counter = CompilationCounter()
    double = jax.jit(lambda x: 2 * x)
    for x, seen in ((np.ones(3), 1), (np.zeros(3), 1), (np.ones(4), 2), (np.ones(3), 2)):
        double(x)
        assert counter.count == seen


def test_run_directory_of_a_finished_run_is_complete(main_run):
    path = main_run.path
    files = {file.name for file in path.iterdir()}
    assert files == {
        "xpo_jax_run.json",
        "config.json",
        "inputs.json",
        "environment.json",
        "metrics.jsonl",
        "tensorboard",
        "pairs.jsonl",
        "samples",
        "evaluations",
        "checkpoints",
        "export",
        "result.json",
        "report.html",
    }
    (events,) = (path / "tensorboard").iterdir()
    assert b"rewards/margins" in events.read_bytes()
    environment = json.loads((path / "environment.json").read_text())
    assert environment["devices"] == {"cpu: cpu": 8}
    assert environment["packages"]["jax"] == jax.__version__
    weights = environment["weights"]
    assert weights["reference"] == weights["policy"] and weights["step"] == 0
    inputs = environment["inputs"]
    assert inputs == json.loads((path / "inputs.json").read_text())
    assert sorted(inputs) == ["data.held_out", "data.train", "judge", "model.path"]
    assert {len(print_) for print_ in inputs.values()} == {64} and len(set(inputs.values())) == 4
    assert [file.name for file in (path / "checkpoints").iterdir()] == [str(STEPS)]
    assert (path / "samples" / "held_out.md").read_text().count("\n") == 2 + HELD_OUT_ROWS
    assert (path / "samples" / "held_out.jsonl").read_text().count("\n") == HELD_OUT_ROWS
    assert f"{STEPS} of {STEPS} steps, finished" in (path / "report.html").read_text()


def test_run_prints_its_setup_first_and_tables_last(main_run, folder):
    out = main_run.out
    for part in (
        "8 x cpu; mesh data 2, fsdp 2, tensor 2",
        "21 prompts",
        "11 prompts",
        "fakes:Patchy",
        "(32, 40)",
    ):
        assert part in out
    # the last of these tables shows ten of the eleven held-out prompts
    rows = [json.loads(line)["text"] for line in (folder / "held_out.jsonl").read_text().splitlines()]
    assert sum(f"\n{text} " in out for text in rows) == 10
    assert "policy before" in out and "policy after" in out


def test_metrics_every_step_has_every_metric(main_run):
    before, *steps = main_run.metrics
    assert [row["step"] for row in main_run.metrics] == list(range(STEPS + 1))
    for row in steps:
        assert set(METRICS) <= set(row)
        assert all(row[name] is not None for name in METRICS)
    for row in (before, steps[-1]):
        assert {"eval/win_rate", "eval/kl", "eval/policy/valid", "eval/reference/valid"} <= set(row)
    assert not any(name.startswith("eval/") for row in steps[:-1] for name in row)
    result = main_run.result
    assert before["eval/win_rate"] == result["win_rate_before"]
    assert (steps[-1]["eval/win_rate"], steps[-1]["eval/kl"]) == (result["win_rate"], result["kl"])


# ---- the algorithm --------------------------------------------------------------------------------


def test_first_step_policy_equals_reference(main_run):
    first, second = main_run.metrics[1], main_run.metrics[2]
    for name in ("objective/kl", "rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert abs(first[name]) < 1e-4
    assert abs(second["objective/kl"]) > 1e-3  # the first update changed it
    judged = 1 - first["judge/failed_rate"]
    assert first["loss/dpo"] == pytest.approx(math.log(2) * judged, rel=1e-5)
    assert main_run.metrics[0]["eval/kl"] == pytest.approx(0, abs=1e-4)


def test_metrics_agree_with_the_pairs_log(main_run):
    pairs, queries = main_run.pairs, 0
    for step, row in enumerate(main_run.metrics[1:]):
        step_pairs = [pair for pair in pairs if pair["step"] == step]
        judged = [pair for pair in step_pairs if pair["weight"] > 0]
        assert len(step_pairs) == (5 if step == 2 else 8)  # 21 rows: the epoch's last batch is partial
        assert [pair["position"] for pair in step_pairs] == list(range(len(step_pairs)))
        assert row["judge/win_rate"] == pytest.approx(np.mean([pair["p_first"] for pair in judged]))
        assert row["judge/tie_rate"] == sum(pair["p_first"] == 0.5 for pair in judged) / len(step_pairs)
        assert row["judge/failed_rate"] == sum(pair["failure"] is not None for pair in step_pairs) / len(
            step_pairs
        )
        queries += sum(pair["shown"] is not None for pair in step_pairs)
        assert row["judge/queries"] == queries
        drawn = sum(len(response["tokens"]) for pair in step_pairs for response in pair["responses"])
        seconds = sum(value for name, value in row.items() if name.startswith("time/"))
        assert row["tokens_per_second"] * seconds == pytest.approx(drawn)
    assert sum(row["judge/failed_rate"] > 0 for row in main_run.metrics[1:]) >= 2


def test_judge_queries_count_the_comparisons_of_the_judge(main_run):
    training = [[c for c in call if c.row["number"] < TRAIN_ROWS] for call in main_run.calls]
    training = [call for call in training if call]
    assert [len(call) for call in training] == np.diff(
        [0] + [m["judge/queries"] for m in main_run.metrics[1:]]
    ).tolist()
    assert main_run.result["judge_queries"] == sum(map(len, training))
    assert main_run.result["evaluation_queries"] == sum(map(len, main_run.calls)) - sum(map(len, training))
    for step, call in enumerate(training):
        judged = [pair for pair in main_run.pairs if pair["step"] == step and pair["shown"]]
        for pair, comparison in zip(judged, call, strict=True):
            texts = [pair["responses"][candidate]["text"] for candidate in pair["shown"]]
            assert (comparison.a, comparison.b) == tuple(texts)
            assert (comparison.row, list(comparison.messages)) == (pair["row"], pair["messages"])


def test_pairs_log_holds_the_verdicts_of_the_judge(main_run):
    orders = set()
    for pair in main_run.pairs:
        policy_length, reference_length = (len(response["text"]) for response in pair["responses"])
        if tokens([pair], 0) == tokens([pair], 1):
            assert (pair["p_first"], pair["shown"]) == (0.5, None)
        elif Patchy.fails(*(response["text"] for response in pair["responses"])):
            a, b = (len(pair["responses"][candidate]["text"]) for candidate in pair["shown"])
            failure = "no verdict" if a > b else "the judge answered nan"
            assert (pair["p_first"], pair["weight"], pair["failure"]) == (None, 0, failure)
        else:
            assert pair["p_first"] == 0.5 + 0.5 * np.sign(policy_length - reference_length)
            assert pair["scores"] == {"policy": policy_length, "reference": reference_length}
        orders.add(tuple(pair["shown"] or ()))
    assert orders >= {(0, 1), (1, 0)}


def test_responses_end_with_their_first_end_token(main_run):
    for pair in main_run.pairs:
        for response in pair["responses"]:
            ends = [token in ENDS for token in response["tokens"]]
            assert not any(ends[:-1]) and ends[-1] == response["finished"]
            assert response["finished"] or len(response["tokens"]) == 8
            assert max(response["tokens"]) < 259  # not one of the padded rows of the vocabulary


def test_epoch_has_every_prompt_once(main_run):
    numbers = [pair["row"]["number"] for pair in main_run.pairs]
    assert sorted(numbers[:TRAIN_ROWS]) == list(range(TRAIN_ROWS))
    assert numbers[:TRAIN_ROWS] != list(range(TRAIN_ROWS))
    assert len(numbers) == TRAIN_ROWS + 8


def plain_batch(pairs, folder):
    """Return sequences i32[2n 48], prompt lengths and total lengths of both responses of n pairs."""
    tokenizer = model_folder.load_tokenizer(folder / "model", SPEAKING)
    prompt = lambda pair: tokenizer.apply_chat_template(
        pair["messages"], add_generation_prompt=True, return_dict=False
    )
    rows = [(prompt(pair), pair["responses"][candidate]["tokens"]) for candidate in (0, 1) for pair in pairs]
    sequences = np.array([(start + response + [0] * 48)[:48] for start, response in rows])
    return sequences, *np.array([(len(start), len(start) + len(response)) for start, response in rows]).T


def plain_logps(params, sequences, starts, ends):
    """Return (log-probabilities, entropies) f32[2 n], summed over each response, from complete logits."""
    model = nnx.merge(graphdef(SPEAKING, stacked=True), params)
    hidden, _ = model.prefill(sequences[:, :-1])
    every = jax.nn.log_softmax(model.unembed(hidden)[..., :259] / TEMPERATURE, axis=-1)
    chosen = jnp.take_along_axis(every, sequences[:, 1:, None], axis=-1)[..., 0]
    at = jnp.arange(1, sequences.shape[1])
    counted = (at >= starts[:, None]) & (at < ends[:, None])
    entropy = -(jnp.exp(every) * every).sum(-1)
    return tuple(jnp.where(counted, x, 0).sum(-1).reshape(2, -1) for x in (chosen, entropy))


def replay(pairs, folder):
    """Run the algorithm again from the pairs log alone, on one device and as plainly as possible.

    Returns the metrics of each step, the parameters after the last, and for each pair the two responses
    that policy and reference sample with the keys of that step and position.
    """
    config, reference = tiny_config(folder), model_folder.load_params(folder / "model", SPEAKING)
    optimizer, _ = make_optimizer(**config.optimizer, steps=STEPS)
    beta, alpha = config.loss.beta, config.loss.alpha

    def loss(params, batch, p, weight):
        (policy_logps, entropy), (reference_logps, _) = (
            plain_logps(params, *batch),
            plain_logps(reference, *batch),
        )
        ratio, n = policy_logps - reference_logps, len(p)
        z = ratio[0] - ratio[1]
        preference = -p * jax.nn.log_sigmoid(beta * z) - (1 - p) * jax.nn.log_sigmoid(-beta * z)
        dpo, xpo = (jnp.sum(weight * term) / n for term in (preference, alpha * policy_logps[1]))
        _, starts, ends = batch
        return dpo + xpo, {
            "loss/dpo": dpo,
            "loss/xpo": xpo,
            "objective/kl": ratio[0].mean(),
            "objective/entropy": entropy[0].sum() / (ends - starts)[:n].sum(),
            "ratio": ratio,
            "policy_logps": policy_logps,
        }

    @jax.jit
    def draw_rows(weights, prompts, lengths, step, candidate):
        keys = row_keys(config.seed, 1, step, jnp.arange(8), candidate)
        return sampler(unstack(weights), prompts, lengths, jnp.ones(8, bool), keys)

    def draw(weights, sequences, starts, step, candidate):
        rows = np.minimum(np.arange(8), len(starts) // 2 - 1)  # a partial batch repeats its last row
        return draw_rows(weights, sequences[rows, :40], starts[rows], step, candidate)

    sampler = make_sampler(
        graphdef(SPEAKING, stacked=False),
        CandidateSampling(**config.sampling),
        vocab_size=259,
        end_tokens=ENDS,
        pad_token=0,
    )
    gradient, update = jax.jit(jax.grad(loss, has_aux=True)), jax.jit(optimizer.update)
    params, state, metrics, drawn = reference, optimizer.init(reference), [], []
    for step in range(STEPS):
        now = [pair for pair in pairs if pair["step"] == step]
        batch = plain_batch(now, folder)
        both = [
            draw(weights, *batch[:2], step, candidate)
            for candidate, weights in enumerate((params, reference))
        ]
        drawn += [
            [list(s.tokens[i][: s.lengths[i]]) for s in map(jax.device_get, both)] for i in range(len(now))
        ]
        p = np.array([0.5 if pair["p_first"] is None else pair["p_first"] for pair in now], np.float32)
        weight = np.array([pair["weight"] for pair in now], np.float32)
        grads, row = gradient(params, batch, p, weight)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        ratio, policy_logps = np.asarray(row.pop("ratio")), np.asarray(row.pop("policy_logps"))
        decisive, won = (weight > 0) & (p != 0.5), np.where(p > 0.5, 0, 1)
        for side, index in (("chosen", won), ("rejected", 1 - won)):
            of_policy, over_reference = (
                x[index, np.arange(len(p))][decisive].mean() for x in (policy_logps, ratio)
            )
            row[f"rewards/{side}"], row[f"logps/policy_{side}"] = beta * over_reference, of_policy
            row[f"logps/reference_{side}"] = of_policy - over_reference
        row["rewards/margins"] = row["rewards/chosen"] - row["rewards/rejected"]
        z = ratio[0] - ratio[1]
        row["rewards/accuracies"] = np.mean(np.where(p > 0.5, z > 0, z < 0)[decisive])
        row["grad_norm"] = optax.tree.norm(grads)
        metrics.append({name: float(value) for name, value in row.items()})
    return metrics, jax.device_get(params), drawn


@pytest.fixture(scope="module")
def replayed(main_run, folder):
    return replay(main_run.pairs, folder)


def test_plain_replay_of_the_pairs_log_gives_the_same_metrics(main_run, replayed):
    for step, (expected, row) in enumerate(zip(replayed[0], main_run.metrics[1:], strict=True)):
        for name, value in expected.items():
            if step or name != "rewards/accuracies":  # before the first update z is zero but for rounding
                assert row[name] == pytest.approx(value, rel=2e-4, abs=2e-4), (step, name)


def test_plain_replay_of_the_pairs_log_gives_the_same_model(main_run, replayed, folder):
    export = model_folder.load_params(main_run.path / "export", SPEAKING)
    start = model_folder.load_params(folder / "model", SPEAKING)
    norm = lambda a, b: float(optax.tree.norm(jax.tree.map(jnp.subtract, a, b)))
    assert norm(replayed[1], start) > 0.1
    assert norm(export, replayed[1]) < 1e-3 * norm(replayed[1], start)


def test_samples_are_those_of_the_current_policy_and_the_reference_with_the_keys_of_the_step(
    main_run, replayed
):
    pairs, drawn = main_run.pairs, replayed[2]
    assert [pair[1] for pair in drawn] == tokens(pairs, 1)
    flipped = sum(
        replayed_tokens != logged_tokens
        for replayed_tokens, logged_tokens in zip((pair[0] for pair in drawn), tokens(pairs, 0), strict=True)
    )
    assert flipped <= 1  # because of rounding in the weights


def test_export_equals_the_checkpoint_bit_for_bit(main_run, folder):
    optimizer, _ = make_optimizer(**tiny_config(folder).optimizer, steps=STEPS)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.eval_shape(lambda params: init_state(params, optimizer), model_folder.param_shapes(SPEAKING))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), like)
    state, extra = checkpoint.restore(main_run.path / "checkpoints", STEPS, like)
    assert (int(state.step), int(state.skipped)) == (STEPS, 0)
    assert extra["counters"] == {
        "queries": main_run.result["judge_queries"],
        "evaluation_queries": main_run.result["evaluation_queries"],
        "skipped_in_a_row": 0,
        "indecisive_in_a_row": 0,
    }
    assert model_folder.read_config(main_run.path / "export") == SPEAKING
    export = model_folder.load_params(main_run.path / "export", SPEAKING)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(
            np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32)
        ),
        export,
        state.params,
    )
    trained = json.loads((main_run.path / "export" / "generation_config.json").read_text())
    assert sorted(trained["eos_token_id"]) == sorted(ENDS) and trained["eos_token_id"][0] == 258
    assert (trained["temperature"], trained["top_k"], trained["do_sample"]) == (TEMPERATURE, 0, True)
    assert trained["max_new_tokens"] == 8  # as in training; the source has none
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (main_run.path / "export" / name).read_bytes() == (folder / "model" / name).read_bytes()


# ---- again, and otherwise ---------------------------------------------------------------------------


def test_run_repeated_gives_the_same_files(main_run, run):
    again = run("again", all_sequence_lengths=True, logging__tensorboard=True)
    assert timeless(again.metrics) == timeless(main_run.metrics)
    assert (again.path / "pairs.jsonl").read_bytes() == (main_run.path / "pairs.jsonl").read_bytes()
    ours, expected = (
        {k: v[1] for k, v in r.files().items() if k.startswith("export")} for r in (again, main_run)
    )
    assert ours == expected and len(ours) >= 5
    places = ("run_dir", "export", "seconds")
    ours, expected = ({k: v for k, v in r.result.items() if k not in places} for r in (again, main_run))
    assert ours == expected


def test_run_already_finished_changes_nothing(main_run, run):
    before = main_run.files()
    again = run("main", all_sequence_lengths=True, logging__tensorboard=True)
    assert again.status == 0
    assert f"{main_run.path} holds this run, finished" in again.out
    assert again.result == main_run.result
    assert main_run.files() == before and again.calls == []


def test_layout_of_mesh_buckets_sequence_lengths_and_update_leaves_results_unchanged(main_run, run):
    other = run(
        "layout",
        mesh__data=1,
        mesh__fsdp=4,
        data__buckets=(40,),
        layout__micro_batch_rows=1,
        layout__chunk_tokens=16,
        layout__remat=True,
    )
    assert other.status == 0, other.err
    assert [tokens(other.pairs, c) for c in (0, 1)] == [tokens(main_run.pairs, c) for c in (0, 1)]
    for row, main_row in zip(timeless(other.metrics), timeless(main_run.metrics), strict=True):
        assert set(row) == set(main_row)
        for name, value in main_row.items():
            if name != "update/padding" and (name != "rewards/accuracies" or main_row["step"] > 1):
                expected = None if value is None else pytest.approx(value, rel=1e-3, abs=2e-4)
                assert row[name] == expected, (main_row["step"], name)
    assert other.result["compilations_during_run"] == 0
    assert other.result["compilations_declared"] == 5 + 1 + 2 * 1


def test_reference_is_frozen_and_its_samples_are_independent_of_the_loss(main_run, run, folder):
    """The run has IPO, an alpha that falls to 0, an entropy bonus, an evaluation in the middle, and unfinished
    responses that lose."""
    alpha = {"kind": "linear", "start": 0.02, "end": 0.0, "steps": 2}
    ipo = run(
        "ipo",
        loss__name="ipo",
        loss__alpha=alpha,
        loss__entropy_weight=0.05,
        loss__unfinished_loses=True,
        evaluation__every_steps=2,
        data__buckets=(40,),
    )
    assert ipo.status == 0, ipo.err
    assert tokens(ipo.pairs, 1) == tokens(main_run.pairs, 1)
    assert tokens(ipo.pairs, 0)[:8] == tokens(main_run.pairs, 0)[:8]
    assert tokens(ipo.pairs, 0) != tokens(main_run.pairs, 0)
    assert [row["alpha"] for row in ipo.metrics[1:]] == [0.02, 0.01, 0.0, 0.0]
    assert [row["beta"] for row in ipo.metrics[1:]] == [0.1] * STEPS
    first = ipo.metrics[1]
    assert first["loss/dpo"] == pytest.approx((1 - first["judge/failed_rate"]) * (0.5 / 0.1) ** 2, rel=1e-4)
    reference = model_folder.load_params(folder / "model", SPEAKING)
    second = np.asarray(plain_logps(reference, *plain_batch(ipo.pairs[:8], folder))[0][1])
    weight = np.array([pair["weight"] for pair in ipo.pairs[:8]])
    assert first["loss/xpo"] == pytest.approx(0.02 * np.sum(weight * second) / 8, rel=1e-4)
    for row in ipo.metrics[1:]:
        total = row["loss/dpo"] + row["loss/xpo"] - 0.05 * row["objective/entropy"]
        assert row["loss/total"] == pytest.approx(total, rel=1e-5)
    assert [row["loss/xpo"] == 0 for row in ipo.metrics[1:]] == [False, False, True, True]
    assert [row["step"] for row in ipo.metrics if "eval/win_rate" in row] == [0, 2, 4]
    unfinished = [pair for pair in ipo.pairs if pair["reason"] == "unfinished response"]
    assert unfinished
    for pair in unfinished:
        policy_finished, reference_finished = (response["finished"] for response in pair["responses"])
        assert not (policy_finished and reference_finished) and pair["shown"] is None
        assert (pair["p_first"], pair["weight"]) == (0.5 + 0.5 * (policy_finished - reference_finished), 1)
    assert ipo.result["evaluation_queries"] + ipo.result["judge_queries"] == sum(map(len, ipo.calls))


def test_online_dpo_samples_both_candidates_from_the_policy(main_run, run):
    dpo = run("dpo", loss__second_candidate="policy", loss__alpha=0.0)
    assert dpo.status == 0, dpo.err
    dpo_pairs, xpo_pairs = dpo.pairs, main_run.pairs
    # before the first update the model is the same, and so are the keys
    assert [tokens(dpo_pairs[:8], c) for c in (0, 1)] == [tokens(xpo_pairs[:8], c) for c in (0, 1)]
    # afterwards the second candidate is no longer the reference's
    assert tokens(dpo_pairs[8:], 1) != tokens(xpo_pairs[8:], 1)
    assert all(row["loss/xpo"] == 0 and row["alpha"] == 0 for row in dpo.metrics[1:])
    assert dpo.metrics[2]["objective/kl"] != 0
    assert dpo.result["compilations_during_run"] == 0


def test_run_with_another_seed_learns_what_the_judge_prefers(main_run, run):
    """The judge prefers length: in the end, the policy's responses are longer than the reference's and win."""
    learned = run(
        "learned",
        seed=4,
        steps=60,
        data__buckets=(40,),
        judge__name="fakes:LongerText",
        optimizer__learning_rate=0.1,
        optimizer__schedule="constant",
        loss__alpha=1e-4,
    )
    assert learned.status == 0, learned.err
    assert [pair["row"] for pair in learned.pairs[:8]] != [pair["row"] for pair in main_run.pairs[:8]]
    assert not set(map(tuple, tokens(learned.pairs[:8], 0))) & set(map(tuple, tokens(main_run.pairs[:8], 0)))
    result, rows = learned.result, learned.metrics
    assert result["win_rate_before_low"] < 0.5 < result["win_rate_before_high"]
    assert result["win_rate_low"] > 0.65
    assert rows[-1]["eval/policy/letters"] > rows[0]["eval/policy/letters"] + 1
    assert rows[-1]["eval/reference/letters"] == rows[0]["eval/reference/letters"]
    assert np.mean([row["rewards/margins"] for row in rows[-5:]]) > 0
    assert result["kl"] > 0.1


# ---- when something is missing ----------------------------------------------------------------------


def test_run_without_verdicts_and_with_another_reference_learns_nothing(main_run, run, folder):
    write_model(folder / "other", seed=1)
    empty = run(
        "silent",
        judge__name="fakes:silent",
        model__reference=str(folder / "other"),
        judging__max_failed_fraction=1.0,
    )
    assert empty.status == 0, empty.err
    for row in empty.metrics[1:]:
        assert (row["judge/failed_rate"], row["judge/tie_rate"], row["judge/win_rate"]) == (1.0, 0.0, None)
        assert row["loss/total"] == row["grad_norm"] == 0
        assert row["rewards/chosen"] is None and row["rewards/accuracies"] is None
        assert row["objective/kl"] > 0.5  # far apart from the start
    assert (empty.result["win_rate"], empty.result["win_rate_low"]) == (None, None)
    assert {pair["failure"] for pair in empty.pairs} == {"no verdict"}
    assert tokens(empty.pairs[:8], 0) == tokens(main_run.pairs[:8], 0)
    assert tokens(empty.pairs[:8], 1) != tokens(main_run.pairs[:8], 1)
    exported, initial = (
        model_folder.load_params(f, SPEAKING) for f in (empty.path / "export", folder / "model")
    )
    jax.tree.map(np.testing.assert_array_equal, exported, initial)


def test_run_with_numbers_that_are_not_finite_stops(run):
    """The learning rate is far too large: after the first update no loss is finite, and max_skipped is 2."""
    wild = run("wild", optimizer__learning_rate=1e30)
    assert wild.status == 2
    assert wild.err.rstrip("\n").split("\n")[-1] == (
        "xpo_jax: step 3: loss or gradient was not finite 2 times in a row; the last good weights are in"
        f" {wild.path}/checkpoints/3; lower optimizer.learning_rate or loss.alpha"
    )
    assert "Traceback" not in wild.err and not wild.out.rstrip("\n").split("\n")[-1].startswith("{")
    assert [row["skipped"] for row in wild.metrics[1:]] == [0, 1, 1]
    # the schedule falls from its second update on, and a skipped one does not count
    assert [row["learning_rate"] for row in wild.metrics[1:]] == pytest.approx([1e30] * 3)
    assert checkpoint.latest(wild.path / "checkpoints") == 3
    assert not (wild.path / "result.json").exists() and not (wild.path / "export").exists()
    again = run("wild", optimizer__learning_rate=1e30)
    assert (
        again.status == 2 and again.err.rstrip("\n").split("\n")[-1] == wild.err.rstrip("\n").split("\n")[-1]
    )


def test_run_with_separate_skipped_updates_and_identical_responses_finishes(run, monkeypatch):
    """Sampling is greedy, so both candidates are equal until the first update. The first and the third update are
    not finite, and max_skipped is 2."""
    update, number = Programs.update, itertools.count()

    def spoiled(self, state, frozen, pairs, packed, alpha, beta):
        return update(self, state, frozen, pairs, packed, math.nan if next(number) in (0, 2) else alpha, beta)

    monkeypatch.setattr(Programs, "update", spoiled)
    greedy = run("greedy", sampling__top_k=1, data__buckets=(40,), optimizer__warmup_steps=2)
    assert greedy.status == 0, greedy.err
    rows = greedy.metrics[1:]
    assert [row["skipped"] for row in rows] == [1, 0, 1, 0] and greedy.result["skipped"] == 2
    # half the peak before the first update, all of it after that
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.005, 0.005, 0.01, 0.01])
    assert [abs(row["objective/kl"]) > 1e-3 for row in rows] == [False, False, True, True]
    for pair in greedy.pairs[:16]:
        assert (pair["p_first"], pair["weight"], pair["shown"]) == (0.5, 1, None)
        assert tokens([pair], 0) == tokens([pair], 1)
    assert [row["judge/tie_rate"] for row in rows[:2]] == [1.0, 1.0]
    assert [row["judge/queries"] for row in rows[:2]] == [0, 0]
    assert rows[1]["grad_norm"] > 0  # the bonus alone
    assert greedy.metrics[0]["eval/queries"] == 0 and greedy.result["win_rate_before"] == 0.5


# ---- a file of answers, and an early end ------------------------------------------------------------


def test_run_against_a_file_of_answers_ends_at_a_limit(run, folder):
    """The file's answers are longer than any sample, so the judge, which prefers length, always prefers them."""
    rows = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    answers = folder / "answers.jsonl"
    answers.write_text("".join(json.dumps({**row, "answer": "x" * 99}) + "\n" for row in rows[::-1]))
    limit = {"evaluation__every_steps": 1, "evaluation__stop_kl": 1e-3}
    done = run("ended", judge__name="fakes:Recording", evaluation__answers=str(answers), **limit)
    assert done.status == 0, done.err
    result, metrics = done.result, done.metrics
    assert result["ended_by"] == "evaluation.stop_kl" and result["steps"] == len(metrics) - 1 < STEPS
    assert all(row["eval/kl"] < 1e-3 for row in metrics[:-1]) and metrics[-1]["eval/kl"] >= 1e-3
    assert f"ended after {result['steps']} of {STEPS} steps: evaluation.stop_kl is 0.001" in done.out
    assert {row["eval/win_rate_answers"] for row in metrics} == {result["win_rate_answers"]} == {0.0}
    assert metrics[0]["eval/queries"] <= HELD_OUT_ROWS * 2 * 3  # two samples against two and the file's
    missing = run("missing", evaluation__answers=str(folder / "train.jsonl"))
    assert missing.status == 2 and "train.jsonl, row 1: no column 'answer'" in missing.err
    assert not (folder / "missing").exists()
