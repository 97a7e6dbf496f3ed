"""Judges that score: transformers' rewards, a user's function, and combinations; with whole runs of each."""

import json
import math
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_run import one_sequence_length, run_main

from xpo_jax.config import loader as configs
from xpo_jax.data.pairs_log import read_pairs
from xpo_jax.experiment.judge_factory import make_judge
from xpo_jax.judges import contract
from xpo_jax.judges.ask import call_by_shares
from xpo_jax.judges.combine import Combination, combine
from xpo_jax.judges.contract import DeviceJudge, HasScores, JudgeError
from xpo_jax.judges.reward import RewardModel, reward_function, reward_model, verdict
from xpo_jax.judges.scores import sigmoid as verdict_sigmoid
from xpo_jax.models.hf import model_folder
from xpo_jax.runtime import collectives
from xpo_jax.runtime.sharding import make_mesh
from xpo_jax.values import Candidate, Comparison, Verdict

pytestmark = pytest.mark.usefixtures("shared_programs")

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "reward"
CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
ARGUMENTS = {
    "path": str(GOLDEN),
    "temperature": 1.0,
    "batch_size": 8,
    "buckets": (64, 160),
    "on_long": "error",
    "chat_template_arguments": None,
}


def attached(mesh: tuple[int, int, int] = (2, 2, 2), **changes: Any) -> RewardModel:
    """Return the judge with its folder open, and nothing compiled."""
    judge = reward_model(**{**ARGUMENTS, **changes})
    judge.attach(
        mesh=make_mesh(data=mesh[0], fsdp=mesh[1], tensor=mesh[2]),
        folder=Path("another"),
        model_config=None,
        tokenizer=None,
        dtype=np.float32,
    )
    return judge


def ready(mesh: tuple[int, int, int] = (2, 2, 2), **changes: Any) -> RewardModel:
    """Return the judge as a run prepares it."""
    judge = attached(mesh, **changes)
    for _, compile_program in judge.declared_programs():
        compile_program()
    judge.load({"not": "its own"})
    return judge


@pytest.fixture(scope="module")
def judge():
    return ready()


def pairs() -> list[tuple[dict, dict]]:
    """Return all pairs of answers to the same conversation."""
    return [(a, b) for a in CASES for b in CASES if a["messages"] == b["messages"]]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ---- the model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [(2, 2, 2), (8, 1, 1)])
def test_reward_model_scores_equal_those_of_transformers(mesh):
    """This holds on any mesh, in any bucket and beside any neighbours; control tokens in an answer are text."""
    judge = ready(mesh, temperature=0.5)
    comparisons = [Comparison(a["messages"], {}, a["answer"], b["answer"]) for a, b in pairs()]
    for (a, b), (p, _, scores) in zip(pairs(), judge(comparisons), strict=True):
        assert scores["a"] == pytest.approx(a["score"], abs=1e-4)
        assert scores["b"] == pytest.approx(b["score"], abs=1e-4)
        assert p == pytest.approx(sigmoid((a["score"] - b["score"]) / 0.5), abs=2e-4)
        assert a is not b or p == 0.5
    assert isinstance(judge, DeviceJudge) and judge([]) == []
    assert isinstance(judge, HasScores) and judge.compare_scores(2.0, 1.0) == pytest.approx(sigmoid(2.0))
    scores = judge.scores([Candidate(case["messages"], {}, case["answer"]) for case in CASES])
    assert scores == pytest.approx([case["score"] for case in CASES], abs=1e-4)


def test_reward_model_chat_template_arguments_reach_the_template(tmp_path):
    folder = shutil.copytree(GOLDEN, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = settings["chat_template"].replace("'<|im_start|>' + m", "(mood or '') + m", 1)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    judge = attached(path=str(folder), chat_template_arguments={"mood": "calm:"})
    tokens = judge._tokens([{"role": "user", "content": "a"}], "b")
    assert judge._tokenizer.decode(tokens) == "calm:user\na<|im_end|>\ncalm:assistant\nb<|im_end|>\n"
    with pytest.raises(
        ValueError, match=r"^judge\.chat_template_arguments: .* reads no moods; correct or remove"
    ):
        attached(path=str(folder), chat_template_arguments={"moods": "calm"})


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_reward_model_of_another_family_scores_as_transformers(family):
    golden = GOLDEN.with_name(f"reward_{family}")
    cases = json.loads((golden / "cases.json").read_text(encoding="utf-8"))
    judge = ready(path=str(golden))
    comparisons = [Comparison(case["messages"], {}, case["answer"], case["answer"]) for case in cases]
    for case, (p, _, scores) in zip(cases, judge(comparisons), strict=True):
        assert scores["a"] == pytest.approx(case["score"], abs=1e-4) and p == 0.5
    assert np.std([case["score"] for case in cases]) > 0.1


def test_reward_model_temperature_zero_gives_hard_verdicts():
    hard = ready(temperature=0.0)(
        [Comparison(a["messages"], {}, a["answer"], b["answer"]) for a, b in pairs()]
    )
    expected = [0.5 + 0.5 * np.sign(a["score"] - b["score"]) for a, b in pairs()]
    assert [p for p, _, _ in hard] == expected and set(expected) == {0.0, 0.5, 1.0}


def test_reward_model_too_long_conversation_ends_the_run_or_has_no_verdict(judge):
    turn = [{"role": "user", "content": "x"}]
    with pytest.raises(
        ValueError, match=r"has 222 tokens, but the last of judge\.buckets holds 160; raise it"
    ):
        judge([Comparison(turn, {}, "a" * 200, "b")])
    with pytest.raises(ValueError, match=r"the last of judge\.buckets"):
        judge.check([{"role": "user", "content": "x" * 160}], {})
    judge.check(turn, {})
    lenient = ready(on_long="no_verdict")
    (long, short) = lenient([Comparison(turn, {}, "a" * 200, "b"), Comparison(turn, {}, "a", "b")])
    assert (long.p, long.reason, long.scores["a"]) == (None, "no score for A", None)
    assert 0 < short.p < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, r"^judge\.temperature is -1\.0.* must be 0 \(hard verdicts\) or more"),
        ({"batch_size": 0}, r"^judge\.batch_size: at least 1 is expected"),
        ({"buckets": (64, 64)}, r"^judge\.buckets: increasing positive integers"),
        ({"on_long": "cut"}, r"^judge\.on_long: 'error' or 'no_verdict' is expected"),
    ],
)
def test_reward_model_invalid_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_judge({"name": "reward_model", **ARGUMENTS, **changes}, "judge")


def test_reward_model_other_folders_are_refused(tmp_path):
    other = GOLDEN.parent / "llm_judge"
    with pytest.raises(ValueError, match=r"is a model of the architectures \['Qwen2ForCausalLM'\], not of"):
        ready(path=str(other))
    for file in other.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_bytes((GOLDEN / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"do not fit config\.json; 1 missing: score\.weight"):
        ready(path=str(tmp_path))
    with pytest.raises(ValueError, match=r"judge\.batch_size 6 is not divisible"):
        ready(batch_size=6)


def test_check_params_reward_head_beside_a_policy_is_refused():
    """What is allowed beside a reward model's weights is not allowed beside a policy's."""
    with pytest.raises(ValueError, match=r"1 unexpected: score\.weight"):
        model_folder.check_params(GOLDEN, model_folder.read_config(GOLDEN))


# ---- the function -------------------------------------------------------------------------------


def letters(prompt: str, answer: str) -> int:
    """Return a score for the tests, as an integer, which is allowed too."""
    if answer == "raise":
        raise RuntimeError("no\nscore")
    return {"none": None, "nan": math.nan, "inf": math.inf, "text": "5"}.get(
        answer, len(answer) - len(prompt)
    )


def one_argument(answer):
    return 0.0


def compared(a: str, b: str, temperature: float = 2.0) -> Verdict:
    judge = reward_function(function="test_reward:letters", temperature=temperature)
    (verdict,) = judge([Comparison([{"role": "user", "content": "ab"}], {}, a, b)])
    return verdict


def test_reward_function_compares_scores():
    assert compared("abcd", "a") == (pytest.approx(sigmoid(1.5)), "A 2; B -1", {"a": 2.0, "b": -1.0})
    assert compared("a", "abcd", 0.0).p == 0.0
    assert compared("abcd", "dcba").p == compared("inf", "inf").p == 0.5
    assert (compared("inf", "x").p, compared("x", "inf").p) == (1.0, 0.0)
    assert (compared("none", "x").p, compared("none", "x").reason) == (None, "no score for A")
    assert compared("nan", "none").reason == "no score for A and B"
    assert compared("x", "raise") == (None, "the score failed: RuntimeError: no\nscore", {})
    assert compared("text", "x").reason.endswith("TypeError: str is no score; return a number, or None")
    assert compared("x" * 5000, "", 1e-9).p == 1.0
    judge = reward_function(function="test_reward:letters", temperature=1.0)
    turn = [{"role": "user", "content": "ab"}]
    assert [judge.parts(turn, text) for text in ("abc", "raise", "inf")] == [{"score": 1.0}, {}, {}]


def test_sigmoid_keeps_the_last_bits_of_logged_verdicts():
    """scipy.special.expit gives 0.043107254941086116 and 0.9998766054240137."""
    assert verdict_sigmoid(-3.1) == 0.04310725494108614 and verdict_sigmoid(9.0) == 0.9998766054240138
    assert (verdict_sigmoid(0.0), verdict_sigmoid(-1e9), verdict_sigmoid(1e9)) == (0.5, 0.0, 1.0)


def test_verdict_equals_the_textbook_sigmoid():
    """The textbook sigmoid in float64, where it can be computed."""
    for a, b, t in ((0.3, -0.2, 1.0), (5.0, 9.0, 2.5), (-30.0, 0.0, 1.0)):
        assert verdict(a, b, t).p == pytest.approx(sigmoid((a - b) / t), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("test_reward:one_argument", r"is called as score\(prompt, answer\), but takes \(answer\)$"),
        ("test_reward:nothing", r"^judge\.function: module 'test_reward' has no 'nothing'"),
        ("letters", r"^judge\.function: 'letters' is unknown"),
    ],
)
def test_reward_function_invalid_function_is_refused(function, message):
    group = {"name": "reward_function", "function": function, "temperature": 1.0}
    with pytest.raises(ValueError, match=message):
        make_judge(group, "judge")


# ---- combinations -------------------------------------------------------------------------------


def always(answer: Any) -> Any:
    return lambda comparisons: [answer] * len(comparisons)


def combined(kind: str, *parts: tuple[float, Any]) -> Verdict:
    judge = Combination({f"j{i}": (w, always(a)) for i, (w, a) in enumerate(parts)}, kind)
    (verdict,) = judge([Comparison((), {}, "x", "y")])
    return verdict


def test_combine_mean_matches_values_by_hand():
    assert combined("mean", (3.0, "A"), (1.0, 0.2)).p == pytest.approx(0.8)
    assert combined("mean", (2.0, "tie"), (2.0, "B")).p == 0.25
    # a part without verdict is left out
    for nothing in (None, math.nan, "prose", 1.5):
        assert combined("mean", (3.0, nothing), (1.0, 0.2), (1.0, 0.4)).p == pytest.approx(0.3)
        assert combined("mean", (3.0, nothing), (1.0, None)).p is None
    assert combined("mean", (0.1, 1.0), (0.2, 1.0), (0.3, 1.0)).p == 1.0  # not rounded beyond 1


def test_combine_sum_adds_log_odds():
    """For reward models, this is the verdict of the weighted sum of rewards."""
    soft = [verdict(2.0, 1.5, 1.0), verdict(-1.0, 0.5, 0.5)]
    expected = sigmoid(0.7 * 0.5 + 0.3 * -1.5 / 0.5)
    assert combined("sum", (0.7, soft[0]), (0.3, soft[1])).p == pytest.approx(expected, rel=1e-9)
    assert combined("sum", (0.7, soft[0]), (0.3, None)).p == pytest.approx(sigmoid(0.7 * 0.5))
    assert combined("sum", (1.0, "A"), (1.0, "B")).p == 0.5
    assert combined("sum", (1.0, "A")).p == pytest.approx(sigmoid(14))
    assert combined("sum", (1.0, None)).p is None


def test_combine_logs_each_part():
    verdict = combined("mean", (1.0, Verdict(0.75, "why", {"a": 3, "b": 2, "mass": 0.9})), (1.0, None))
    assert verdict.scores == {
        "a": {"j0": {"p": 0.75, "score": 3}, "j1": {"p": None}},
        "b": {"j0": {"p": 0.25, "score": 2}, "j1": {"p": None}},
        "else": {"j0": {"mass": 0.9}},
        "queries": 2,
    }
    assert verdict.reason == "j0: 0.750 for A, why; j1: no verdict, no verdict"


def test_combine_failed_part_is_left_out_and_integer_ends_the_run():
    def broken(comparisons):
        raise RuntimeError("gone")

    judge = Combination({"a": (1.0, broken), "b": (1.0, always("A"))}, "mean")
    (verdict,) = judge([Comparison((), {}, "x", "y")])
    assert (
        verdict.p == 1.0
        and "a: no verdict, the judge failed: RuntimeError: gone (test_reward.py" in verdict.reason
    )
    with pytest.raises(JudgeError, match="^b: the judge answered the int 1, which is refused"):
        Combination({"b": (1.0, always(1))}, "mean")([Comparison((), {}, "x", "y")])


FUNCTION = {"name": "reward_function", "function": "test_reward:letters", "temperature": 1.0}


@pytest.mark.parametrize(
    ("judges", "message"),
    [
        ((), r"^judge\.judges: give at least one"),
        (({"weight": 1.0},), r"^judge\.judges\[0\]\.name is missing"),
        (({"weight": 0, **FUNCTION},), r"^judge\.judges\[0\]\.weight must be a number above 0, found 0"),
        ((FUNCTION,), r"^judge\.judges\[0\]\.weight must be a number above 0, found None"),
        (
            ({"weight": 1, **FUNCTION}, {"weight": 1, **FUNCTION, "temperatur": 1}),
            r"^judge\.judges\[1\]\.temperatur: no such field; did you mean 'temperature'",
        ),
    ],
)
def test_combine_invalid_groups_are_refused(judges, message):
    with pytest.raises(ValueError, match=message):
        configs.build(
            combine,
            {"name": "combine", "judges": judges, "kind": "mean"},
            "judge",
            make_judge=make_judge,
            call_by_shares=call_by_shares,
        )


def test_combine_passes_optional_methods_to_its_parts():
    model = {"weight": 0.5, "name": "reward_model", **ARGUMENTS}
    both = make_judge(
        {"name": "combine", "kind": "mean", "judges": (model, {"weight": 0.5, **FUNCTION})}, "judge"
    )
    assert isinstance(both, DeviceJudge) and both.collective
    assert both._call_by_shares is call_by_shares
    alone = make_judge(
        {"name": "combine", "kind": "mean", "judges": ({"weight": 1, **FUNCTION},) * 2}, "judge"
    )
    assert not alone.collective and alone.declared_programs() == []
    assert alone.models() == [] and alone.stats() == {}
    alone.probe()
    turn = [{"role": "user", "content": "ab"}]
    assert alone.parts(turn, "abc") == {"score": 1.0, "reward_function_1/score": 1.0}
    with pytest.raises(ValueError, match="No such file|not a folder|no such"):
        broken = {**model, "path": "nowhere"}
        judge = make_judge({"name": "combine", "kind": "mean", "judges": (broken,)}, "judge")
        judge.attach(
            mesh=make_mesh(data=8, fsdp=1, tensor=1),
            folder=GOLDEN,
            model_config=None,
            tokenizer=None,
            dtype=None,
        )


def test_combine_stats_models_and_probe_are_by_part():
    class Server:
        def __call__(self, comparisons):
            return ["A"] * len(comparisons)

        def stats(self):
            return {"requests": 3}

        def models(self):
            return [{"path": "some-one/judge", "commit": "a" * 40}]

        def probe(self):
            raise ValueError("nobody is there")

    both = Combination({"server": (1.0, Server()), "rule": (1.0, always("A"))}, "mean")
    assert both.stats() == {"server/requests": 3}
    assert both.models() == [{"path": "some-one/judge", "commit": "a" * 40}]
    with pytest.raises(ValueError, match="^server: nobody is there$"):
        both.probe()


def test_combine_shares_out_what_needs_no_devices(monkeypatch):
    """Two processes, as threads: each asks the part about its own shard, and both get all verdicts."""

    class OnDevices:
        collective = True

        def __call__(self, comparisons):
            return ["tie"] * len(comparisons)

    class ByText:
        def __init__(self):
            self.texts = []

        def __call__(self, comparisons):
            self.texts += [c.a for c in comparisons]
            if "broken" in self.texts:
                raise JudgeError("no use")
            return [Verdict(float(len(c.a)) / 10, c.a, {"a": len(c.a)}) for c in comparisons]

    process, barrier, values = threading.local(), threading.Barrier(2), [None, None]

    def all_gather(value):
        values[process.number] = json.loads(json.dumps(value))
        barrier.wait(60)
        return list(values)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: process.number)
    monkeypatch.setattr(collectives, "all_gather", all_gather)

    def run(number, texts):
        process.number, host = number, ByText()
        both = Combination({"devices": (1.0, OnDevices()), "host": (1.0, host)}, "mean", call_by_shares)
        try:
            return host.texts, both([Comparison((), {}, text, "b") for text in texts])
        except JudgeError as error:
            return host.texts, str(error)

    with ThreadPoolExecutor(2) as pool:
        (first, verdicts), (second, others) = pool.map(run, (0, 1), [["a", "aa", "aaa", "aaaa", "aaaaa"]] * 2)
        assert (first, second) == (["a", "aa"], ["aaa", "aaaa", "aaaaa"])
        assert verdicts == others
        assert [v.p for v in verdicts] == pytest.approx([0.3, 0.35, 0.4, 0.45, 0.5])
        assert [v.scores["a"]["host"]["score"] for v in verdicts] == [1, 2, 3, 4, 5]
        broken = list(pool.map(run, (0, 1), [["a", "broken"]] * 2))
        assert [error for _, error in broken] == ["host: no use"] * 2


def test_combine_names_the_part_in_doubt():
    class Doubtful:
        def __call__(self, comparisons):
            return ["A"] * len(comparisons)

        def doubt(self):
            return "who knows"

    both = Combination({"model": (1.0, Doubtful()), "rule": (1.0, always("A"))}, "mean")
    assert contract.doubt(both) == "model: who knows"
    assert contract.doubt(always("A")) == ""


# ---- whole runs ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reward_model", "combine"])
def test_run_of_the_embedded_default_with_other_judges(kind, tmp_path):
    """This is the example's config but for judge and size; both orders are judged, and a budget ends the run."""
    config = configs.load(str(ROOT / "configs" / "paraphrase.py"))
    paraphrase = config.judge.to_dict()
    model = {
        "name": "reward_model",
        **ARGUMENTS,
        "batch_size": 16,
        "buckets": (512,),
    }
    judges = ({"weight": 0.7, **model}, {"weight": 0.3, **paraphrase})
    judge = model if kind == "reward_model" else {"name": "combine", "kind": "mean", "judges": judges}
    config = config.to_dict()
    config["judge"] = judge
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    parts_asked = 1 if kind == "reward_model" else 2
    # evaluations of 8 x 2 x 2 comparisons at most, and two steps of 16 x 2; a third one does not fit
    most = (32 + 32 + 32 + 32) * parts_asked
    changes = {
        "run_dir": tmp_path / "run",
        "steps": 4,
        "batch_size": 16,
        "layout.micro_batch_rows": 2,
        "data.buckets": "40,",
        "logging.tensorboard": "false",
        "evaluation.prompts": 8,
        "evaluation.reference_samples": 1,
        "judging.both_orders": "true",
        "judging.max_queries": most,
    }
    with one_sequence_length():
        status, out, err = run_main([f"--config={path}", *(f"--config.{k}={v}" for k, v in changes.items())])
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["ended_by"] == "judging.max_queries" and 2 <= result["steps"] < 4
    assert f"ended after {result['steps']} of 4 steps: judging.max_queries is {most}" in out
    assert result["judge_queries"] + result["evaluation_queries"] <= most
    assert result["compilations_during_run"] == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == result["steps"] + 1 and "eval/win_rate" in rows[-1]
    assert rows[-1]["judge/queries"] == result["judge_queries"]
    assert all(row["judge/position_flip_rate"] == 0 and row["judge/failed_rate"] == 0 for row in rows[1:])
    judged = [pair for pair in read_pairs(tmp_path / "run" / "pairs.jsonl") if pair["shown"] is not None]
    assert len(judged) * 2 * parts_asked == result["judge_queries"]
    for pair in judged:
        policy, reference = (pair["scores"][name] for name in ("policy", "reference"))
        if kind == "combine":
            parts = [side["paraphrase"]["p"] for side in (policy, reference)]
            assert parts == pytest.approx(
                [0.5 + 0.5 * math.tanh(d / 0.2) for d in _difference(policy, reference)]
            )
            policy, reference = (side["reward_model"]["score"] for side in (policy, reference))
            expected = 0.7 * sigmoid(policy - reference) + 0.3 * parts[0]
        else:
            expected = sigmoid(policy - reference)
        assert pair["p_first"] == pytest.approx(expected, abs=1e-4)


def _difference(policy: Any, reference: Any) -> tuple[float, float]:
    by_rules = [side["paraphrase"]["score"]["score"] for side in (policy, reference)]
    return by_rules[0] - by_rules[1], by_rules[1] - by_rules[0]
