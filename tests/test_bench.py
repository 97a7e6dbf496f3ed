"""tools.bench: its counts and floors by hand, its table, and a peer that is a script of the test."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from tools.bench import __main__ as bench
from tools.bench import figures, trl_client
from tools.bench.parts import Bench, Part
from tools.bench.step import Step
from tools.bench.workload import Workload, part_flops, response_lengths
from tools.build import random_model
from tools.planner import estimate, work
from xpo_jax.models.hf import model_folder
from xpo_jax.models.lora import OFF
from xpo_jax.models.qwen2 import Qwen2Config

S = Qwen2Config.from_hf(bench.shape(*bench.SIZES["S"]))
M = Qwen2Config.from_hf(bench.shape(*bench.SIZES["M"]))
SMALL = bench.shape(16, 2, 24, 64)
COMPILED = ("prefill", "sample", "score", "accumulate", "apply", "for_sampling")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_model.write(tmp_path_factory.mktemp("bench") / "small", SMALL)


# ---- counts ---------------------------------------------------------------------------------------


def test_sizes_have_their_parameters_by_hand():
    layer = 2 * 256 + (65536 + 256) + 2 * (16384 + 64) + 65536 + 3 * 180224  # norms; q; k, v; o; the MLP
    assert estimate.parameters(S) == 8192 * 256 + 6 * layer + 256 == 6_329_856
    layer = 2 * 512 + (262144 + 512) + 2 * (65536 + 128) + 262144 + 3 * 720896
    assert estimate.parameters(M) == 32000 * 512 + 8 * layer + 512 == 38_943_232
    assert (S.head_dim, S.num_key_value_heads, M.head_dim, M.num_key_value_heads) == (32, 2, 64, 2)


def test_part_flops_of_size_s_by_hand():
    """8 prompts of 64 tokens, 64 new ones each: 8,454,144 FLOPs a token, 6,144 a pair, 4,194,304 a row of logits."""
    fed = 16 * 63
    assert part_flops(S, 64, response_lengths("fixed", 8, 64)) == {
        "prefill": 1024 * 8_454_144 + 16 * 64 * 64 * 6_144 + 16 * 4_194_304,
        "decode": fed * (8_454_144 + 128 * 6_144 + 4_194_304),
        "score": (512 + fed) * 8_454_144 + (8 * 64 * 64 + fed * 127) * 6_144 + 1024 * 4_194_304,
        "accumulate": 54_399_369_216,
    }


def test_part_flops_of_equal_lengths_is_that_of_the_planner():
    s = SimpleNamespace(
        model=S, batch_size=8, prompt_tokens=16, response_tokens=24, judge=None, remat=False, lora=OFF
    )
    s.candidates, s.pairs, s.ranked = 1, 1, False
    planned, flops = work.flops(s), part_flops(S, 16, response_lengths("fixed", 8, 24))
    assert flops["prefill"] + flops["decode"] == planned["sample"][0]
    assert (flops["score"], flops["accumulate"]) == (planned["score"][0], planned["update"][0])


def test_part_flops_of_a_batch_is_that_of_its_rows():
    rows = np.array([[2, 9, 5], [7, 2, 3]])
    one_by_one = [part_flops(S, 4, rows[:, [i]]) for i in range(3)]
    assert part_flops(S, 4, rows) == {name: sum(row[name] for row in one_by_one) for name in one_by_one[0]}


def test_response_lengths_lognormal_have_the_stated_mean():
    drawn = response_lengths("lognormal", 20_000, 128)
    assert drawn.min() >= 2 and drawn.max() == 128
    assert drawn.mean() == pytest.approx(40, abs=0.6)  # the cut takes some 0.3 away
    assert np.median(drawn) == pytest.approx(40 * np.exp(-0.18), abs=0.6)


# ---- parts ------------------------------------------------------------------------------------------


LENGTHS = np.array([[2, 3, 4, 5, 6, 2, 3, 4], [3, 6, 2, 2, 5, 4, 3, 2]])


def small_workload(reference_steps=1):
    return Workload(
        prompts=8,
        prompt_tokens=4,
        lengths=LENGTHS,
        new_tokens=6,
        micro_batch_rows=2,
        chunk_tokens=64,
        remat=False,
        reference_steps=reference_steps,
    )


def test_bench_programs_are_compiled_once_and_responses_have_their_lengths(folder):
    lengths = LENGTHS
    parts = Bench(Step(folder, small_workload()))
    counter = parts.step.counter
    assert list(parts.parts) == [
        "prefill",
        "sample",
        "decode",
        "score",
        "accumulate",
        "apply",
        "for_sampling",
        "step",
    ]
    widths = len(parts.step.programs.packer.widths)
    expected = dict.fromkeys(COMPILED, 1) | {"score": widths, "accumulate": widths}
    assert {name: parts.parts[name].compilations for name in COMPILED} == expected
    np.testing.assert_array_equal(parts.drawn, lengths)
    before = counter.count
    for part in parts.parts.values():
        if part.run:
            part.run()
            part.run()
    assert counter.count == before
    assert parts.parts["sample"].tokens == lengths[0].sum() == parts.parts["decode"].tokens + 8
    a_token = 2 * 2 * 2 * 2 * 4  # keys and values, layers, heads of two, float32; a row of a device
    weights = 4 * estimate.parameters(model_folder.read_config(folder))
    assert parts.parts["decode"].bytes == (lengths[0].max() - 1) * (weights + (4 + 6) * a_token)


def test_figures_of_parts_against_their_floors_by_hand():
    def part(name, flops, moved):
        return Part(name, None, 12, flops, moved, seconds=[4.0, 2.0, 3.0])

    names = ("prefill", "decode", "score", "accumulate", "apply", "for_sampling")
    parts = {name: part(name, 100, 20) for name in names} | {n: part(n, 0, 0) for n in ("sample", "step")}
    parts["apply"] = part("apply", 0, 20)
    step = SimpleNamespace(mesh=SimpleNamespace(size=1))
    timed = SimpleNamespace(parts=parts, step=step, judge=None)
    results = figures.figures(timed, 200.0, dict.fromkeys(names, 100.0))
    floors = {name: row["floor_seconds"] for name, row in results.items()}
    assert floors["prefill"] == 0.5 and floors["apply"] == 0.2  # FLOPs decide; bytes decide
    assert floors["sample"] == 1.0 and floors["step"] == pytest.approx(2 * 1.0 + 3 * 0.5 + 0.2)
    assert results["decode"]["fraction_of_floor"] == pytest.approx(0.5 / 3)
    assert results["decode"]["tokens_per_second"] == 4.0


def test_bench_with_reference_steps_samples_for_three_steps_in_one_call(folder):
    """Rows end where they should in the larger call as well; a step has a third of that call."""
    lengths = LENGTHS
    parts = Bench(Step(folder, small_workload(reference_steps=3)))
    prefetch, step = parts.parts["prefetch"], parts.step
    before = step.counter.count
    assert (prefetch.steps, prefetch.compilations, prefetch.tokens) == (3, 1, lengths[1].sum())
    np.testing.assert_array_equal(prefetch.run().lengths, np.tile(lengths[1], 3))
    parts.parts["step"].run()
    np.testing.assert_array_equal(step.prefetched.lengths, np.tile(lengths[1], 3))
    assert step.counter.count == before and parts.parts["step"].steps == 3
    sampled = part_flops(step.config, 4, lengths[1:])
    assert prefetch.flops == sampled["prefill"] + sampled["decode"]
    weights = 4 * estimate.parameters(step.config)
    decoded = (6 - 1) * (weights // 3 + (4 + 6) * 2 * 2 * 2 * 2 * 4)
    assert prefetch.bytes == parts.parts["prefill"].bytes + decoded


def test_step_with_judge_of_steps_that_share_a_call_by_hand():
    # three steps; one has 0.2 + 3 x 0.4 s of other work, the others 0.2: they wait for 0, 0.8 and 0.8 s
    assert figures.step_with_judge(2.0, 1.0, 0.2, 0.4, 3) == pytest.approx(2.0 + 1.6 / 3)


def test_judge_line_of_one_step_by_hand():
    seconds = {"step": 2.0, "sample": 0.5, "score": 0.25, "judged": 2.5}
    parts = {name: Part(name, None, 0, 0, 0, seconds=[s]) for name, s in seconds.items()}
    line = figures.judge_line(SimpleNamespace(parts=parts, judge=1.0))
    assert line.startswith("a judge of 1 s: 2.500 s a step, +11.1% against the 2.250 s that remain")
    assert figures.step_with_judge(2.0, 0.5, 0.25, 0.5) == 2.0  # the judge is hidden entirely


def test_main_shows_a_row_for_every_part(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # on a busy machine the figures are wide
    argv = [
        str(folder),
        "--batch=8",
        "--prompt=4",
        "--new=3",
        "--repeat=2",
        "--reference_steps=1",  # more have a row of their own
        "--judge=0.01",
        f"--json={tmp_path / 'figures.json'}",
    ]
    assert bench.main(argv) == 0
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "figures.json").read_text())["parts"]
    rows = [line.split()[0] for line in shown.split("\n---")[-1].splitlines()[1:] if line.strip()]
    assert rows == [*results, "a"] and len(results) == 9  # the last line is about the judge
    assert results["judged"]["seconds"] > 0.01
    assert all(results[name]["compilations"] >= 1 for name in COMPILED)
    assert all(row["seconds"] > 0 and row["floor_seconds"] > 0 for row in results.values())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["S", "--batch=0"], "--batch=0: a positive number"),
        (["S", "--new=1"], "--new=1: at least 2"),
        (["S", "--peer=trl"], "--peer=trl and --peer_python=PYTHON must be given together"),
        (["S", "--cores=100000"], "--cores=100000: this machine has"),
        (["S", "--lengths=short"], "invalid choice: 'short'"),
        (["nowhere"], "nowhere"),
    ],
)
def test_main_invalid_input_is_one_line(argv, message, capsys):
    assert bench.main(argv) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bench: ")]
    assert len(errors) == 1 and message in errors[0]


# ---- the peer ---------------------------------------------------------------------------------------


@pytest.fixture
def peer(tmp_path, monkeypatch):
    """Starts a script in place of TRL."""

    def start(text):
        script = tmp_path / "script.py"
        script.write_text("import json, sys\nspec = json.load(open(sys.argv[1]))\n" + text)
        monkeypatch.setattr(trl_client, "SCRIPT", script)
        options = bench.parse(["S", "--repeat=3"])
        return trl_client.Peer(sys.executable, tmp_path, np.ones((2, 3), int), np.ones((2, 2), int), options)

    return start


def test_peer_ratios_are_those_of_medians(peer):
    trl = peer(
        "print('a line of its own')\n"
        "for step, _ in enumerate(sys.stdin):\n"
        "    row = {'step': [99, 4, 8, 6][step], 'generation': 3, 'judge': len(spec['prompts'])}\n"
        "    print(json.dumps(row), flush=True)\n"
    )
    try:
        trl.step()
        for _ in range(3):
            trl.step(measured=True)
    finally:
        trl.close()
    ours = {
        "step": Part("step", None, 0, 0, 0, seconds=[2.0]),
        "sample": Part("sample", None, 0, 0, 0, seconds=[0.5]),
    }
    ratios = trl.ratios(SimpleNamespace(parts=ours))
    assert ratios == {"step": (2.0, 6.0, 3.0), "generation": (1.0, 3.0, 3.0), "judge": (None, 2.0, None)}


def test_peer_that_fails_is_one_line(peer):
    trl = peer("raise ModuleNotFoundError('no trl here')")
    with pytest.raises(ValueError, match=r"ended with status 1: ModuleNotFoundError: no trl here$"):
        trl.step()
    trl.close()
