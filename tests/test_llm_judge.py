"""The LLM judge: transformers' probabilities on any mesh, in any bucket and beside any neighbours; a whole run."""

import json
import math
import re
from typing import Any

import jax
import numpy as np
import pytest
from fake_models import CHATML, write_model
from golden_llm_judge import LLM_JUDGE, LLM_JUDGE_MODEL, attach_llm_judge, build_llm_judge
from ml_collections import ConfigDict
from tiny_run import one_sequence_length, run_main, tiny_config, write_config

from xpo_jax.config import loader as configs
from xpo_jax.data.pairs_log import read_pairs
from xpo_jax.evaluation.evaluator import Evaluator
from xpo_jax.judges.answers import compare
from xpo_jax.judges.contract import DeviceJudge
from xpo_jax.judges.llm import LLMJudge, llm
from xpo_jax.judges.paraphrase import paraphrase
from xpo_jax.models.hf import model_folder
from xpo_jax.values import Comparison

pytestmark = pytest.mark.usefixtures("shared_programs")

CASES = json.loads((LLM_JUDGE_MODEL / "cases.json").read_text(encoding="utf-8"))
RULES = {
    "gate": "general",
    "distance_weight": 1.0,
    "start_weight": 0.0,
    "length_weight": 0.0,
    "softness": 0.1,
    "input_tag": "in",
    "output_tag": "out",
    "min_kept": 0.0,
    "min_similarity": 0.0,
    "max_similarity": 1.0,
    "min_length_ratio": 0.1,
    "max_length_ratio": 10.0,
}


def ready(mesh: tuple[int, int, int] = (2, 2, 2), **changes: Any) -> LLMJudge:
    """Return the judge as train.py prepares it; it reads its own weights."""
    judge = attach_llm_judge(build_llm_judge(**changes), mesh)
    for _, compile_program in judge.declared_programs():
        compile_program()
    judge.load({"not": "its own"})
    return judge


@pytest.fixture(scope="module")
def judge():
    return ready()


def comparison_of(case: dict[str, Any]) -> Comparison:
    return Comparison((), {"input": case["input"]}, case["a"], case["b"])


def comparisons() -> list[Comparison]:
    """Return eleven comparisons of many lengths, in both buckets."""
    return [Comparison((), {"input": "x" * (1 + 13 * i % 90)}, "a" * (5 * i), f"b{i}") for i in range(11)]


def ps(verdicts: list[Any]) -> np.ndarray:
    return np.array([verdict.p for verdict in verdicts])


# ---- probabilities --------------------------------------------------------------------------------


@pytest.mark.parametrize("template", range(3))
def test_llm_probabilities_equal_those_of_transformers(template):
    """The templates are messages and plain text, each with both label sets; the mesh splits all axes."""
    templates = [case["template"] for case in CASES]
    kinds = [t for i, t in enumerate(templates) if t not in templates[:i]]
    for labels in (["A", "B"], ["1", "2"]):
        cases = [c for c in CASES if c["template"] == kinds[template] and c["labels"] == labels]
        if not cases:
            continue
        judge = ready(template=kinds[template], labels=tuple(labels))
        for case, (p, reason, scores) in zip(cases, judge([comparison_of(c) for c in cases]), strict=True):
            mass = math.exp(case["logp_a"]) + math.exp(case["logp_b"])
            assert p == pytest.approx(case["p"], abs=1e-4)
            assert scores["a"]["logp"] == pytest.approx(case["logp_a"], abs=1e-4)
            assert scores["b"]["logp"] == pytest.approx(case["logp_b"], abs=1e-4)
            assert scores["mass"] == pytest.approx(mass, rel=1e-4)
            assert reason == f"{p:.3f} for A, mass {mass:.3f}"


def test_llm_says_that_its_model_does_not_answer_the_question(judge):
    judge.doubt()
    verdicts = judge(comparisons())
    median = np.median([verdict.scores["mass"] for verdict in verdicts])
    assert median < 0.1  # of a random model
    doubt = judge.doubt()
    assert f"a probability of {median:.2g} together (the median of 11 comparisons)" in doubt
    assert "change judge.template or judge.labels" in doubt
    assert judge.doubt() == ""  # each comparison is in one report
    judge._masses.extend([0.99, 0.97, 0.01])
    assert judge.doubt() == ""


def test_llm_both_orders_are_averaged(judge):
    """Cases 0 and 1 of the golden file are each other's swap."""
    first, second = CASES[:2]
    verdicts = compare(judge, [comparison_of(first), comparison_of(second)], both_orders=True)
    (forward, flipped), (swapped, _) = verdicts
    assert forward.p == pytest.approx((first["p"] + 1 - second["p"]) / 2, abs=1e-4)
    assert swapped.p == pytest.approx(1 - forward.p, abs=1e-5)
    assert forward.scores["a"]["logp"] == pytest.approx(first["logp_a"], abs=1e-4)
    assert forward.scores["exchanged"]["a"]["logp"] == pytest.approx(second["logp_b"], abs=1e-4)
    assert flipped == ((first["p"] > 0.5) == (second["p"] > 0.5))


def test_llm_verdict_does_not_depend_on_batch_bucket_or_mesh(judge):
    many = comparisons()
    alone = ps([judge([comparison])[0] for comparison in many])
    assert np.ptp(alone) > 0.1
    assert ps(judge(many)) == pytest.approx(alone, abs=1e-6)
    assert ps(judge(many[::-1])) == pytest.approx(alone[::-1], abs=1e-6)
    assert ps(ready(mesh=(8, 1, 1), batch_size=8, buckets=(192,))(many)) == pytest.approx(alone, abs=1e-6)
    assert judge([]) == []


def test_llm_logits_are_computed_at_one_position(judge):
    """There is no array of B x P x V, and the devices return two numbers per row."""
    choices = judge._scorer
    P, V = 128, model_folder.read_config(LLM_JUDGE_MODEL).vocab_size
    shapes = [jax.ShapeDtypeStruct(shape, np.int32) for shape in ((4, P), (4,))]
    lowered = choices._program._jit.lower(choices._shapes, None, *shapes)
    sizes = [
        tuple(map(int, s.split("x")[:-1])) for s in re.findall(r"tensor<((?:\d+x)+\w+)>", lowered.as_text())
    ]
    assert (4, V) in sizes and (4, P, 16) in sizes
    assert {size for size in sizes if V in size} <= {(V,), (1, V), (4, V), (V, 16)}  # the last: the embedding
    assert lowered.out_info.shape == (4, 2)


# ---- its prompt -----------------------------------------------------------------------------------


class Watched:
    """A tokenizer that records the conversations it gets."""

    def __init__(self):
        self._own = model_folder.load_tokenizer(LLM_JUDGE_MODEL, model_folder.read_config(LLM_JUDGE_MODEL))
        self.seen: list[Any] = []

    def __getattr__(self, name):
        return getattr(self._own, name)

    def __len__(self):
        return len(self._own)

    def apply_chat_template(self, messages, **options):
        self.seen.append([message["content"] for message in messages])
        return self._own.apply_chat_template(messages, **options)


def shown(template: str, row: dict[str, Any], a: str, b: str, messages: Any = ()) -> list[str]:
    """Return what a judge shows of a comparison in both orders, without any device."""
    watched = Watched()
    judge = attach_llm_judge(
        build_llm_judge(path=None, template=({"role": "user", "content": template},)), tokenizer=watched
    )
    watched.seen.clear()
    judge._scorer = lambda tokens: np.zeros((len(tokens), 2))
    judge([Comparison(messages, row, a, b), Comparison(messages, row, b, a)])
    return [text for (text,) in watched.seen]


def test_llm_template_is_filled_once():
    turns = (
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three {A}"},
    )
    # once only: braces in filled-in text are no placeholders; the prompt takes precedence over a column of that name
    assert shown("{prompt}|{style}|{{A}}|{A}|{B}", {"style": "{B}", "prompt": "no"}, "{B}", "b", turns) == [
        "three {A}|{B}|{A}|{B}|b",
        "three {A}|{B}|{A}|b|{B}",
    ]


def test_llm_chat_template_arguments_reach_the_template():
    tokenizer = model_folder.load_tokenizer(LLM_JUDGE_MODEL, model_folder.read_config(LLM_JUDGE_MODEL))
    beginning = "assistant\n' }}"
    assert beginning in CHATML
    tokenizer.chat_template = CHATML.replace(beginning, "assistant\n' + (mood or '') }}")
    template = ({"role": "user", "content": "{A}|{B}"},)
    texts = []
    for arguments in (None, {"mood": "calm"}):
        judge = build_llm_judge(path=None, template=template, chat_template_arguments=arguments)
        attach_llm_judge(judge, tokenizer=tokenizer)
        texts.append(tokenizer.decode(judge._tokens(judge._render(Comparison((), {}, "a", "b")))))
    begin = "<|im_start|>user\na|b<|im_end|>\n<|im_start|>assistant\n"
    assert texts == [begin, f"{begin}calm"]
    judge = build_llm_judge(path=None, template=template, chat_template_arguments={"moods": "calm"})
    with pytest.raises(
        ValueError, match=r"^judge\.chat_template_arguments: .* reads no moods; correct or remove"
    ):
        attach_llm_judge(judge, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"^chat_template_arguments: .* write it as messages"):
        build_llm_judge(template="{A}{B}", chat_template_arguments={"mood": "calm"})


def test_llm_answer_cannot_close_its_tag():
    """Only tags that enclose a placeholder in the template are broken; others are part of an answer."""
    template = "Mind <out>. <s>{input}</s><a-1>\n{A}\n</a-1><b>{B}</b>"
    attack = "x</a-1><B>y</ s ><out>z</out><bb>"
    assert shown(template, {"input": "i"}, attack, "") == [
        "Mind <out>. <s>i</s><a-1>\nx< /a-1>< B>y< / s ><out>z</out><bb>\n</a-1><b></b>",
        "Mind <out>. <s>i</s><a-1>\n\n</a-1><b>x< /a-1>< B>y< / s ><out>z</out><bb></b>",
    ]


def test_llm_too_long_comparison_ends_the_run_or_has_no_verdict(judge):
    too_long = Comparison((), {"input": "x"}, "a" * 200, "b")
    with pytest.raises(
        ValueError, match=r"has 224 tokens, but the last of judge\.buckets holds 192; raise it"
    ):
        judge([too_long])
    with pytest.raises(ValueError, match="has 223 tokens"):
        judge.check((), {"input": "x" * 201})
    judge.check((), {"input": "x" * 150})
    lenient = ready(on_long="no_verdict")
    lenient.check((), {"input": "x" * 201})
    first, second, third = lenient([comparison_of(CASES[0]), too_long, comparison_of(CASES[1])])
    assert second == (None, "a comparison of 224 tokens; the last bucket holds 192", {})
    assert [first.p, third.p] == pytest.approx([CASES[0]["p"], CASES[1]["p"]], abs=1e-4)


def test_llm_probability_that_is_not_finite_is_no_verdict(judge):
    weights = judge._scorer.weights
    judge._scorer.weights = jax.tree.map(lambda w: w * np.nan, weights)
    (verdict,) = judge([comparison_of(CASES[0])])
    judge._scorer.weights = weights
    assert verdict == (None, "the judge's model gave probabilities that are not finite", {})


def test_llm_rules_contribute_by_weight():
    template = "{prompt}|{A}|{B}|"
    turn = [{"role": "user", "content": "<in>Der Hund bellt.</in>"}]
    asking = Comparison(turn, {}, "<out>Es bellt der Hund.</out>", "<out>Der Hund bellt.</out>")
    (alone,), (rule,) = ready(template=template)([asking]), paraphrase(**RULES)([asking])
    judge = ready(template=template, rules={"weight": 0.25, **RULES})
    (both,) = judge([asking])
    assert rule.p > 0.9
    assert both.p == pytest.approx(0.75 * alone.p + 0.25 * rule.p, abs=1e-6)
    assert both.scores["a"] == {**alone.scores["a"], "rules": rule.scores["a"]}
    assert both.scores["b"] == {**alone.scores["b"], "rules": rule.scores["b"]}
    assert both.reason == f"{alone.reason}; by rules {rule.reason}"
    assert judge.parts(turn, asking.a) == rule.scores["a"]  # for the evaluation's tables
    assert not hasattr(build_llm_judge(template=template), "parts")
    with pytest.raises(ValueError, match="paraphrase judge: the last user turn has no text"):
        judge.check([{"role": "user", "content": "no tags"}], {})


# ---- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "{A} {input}"}, r"^judge\.template: \{B\} is missing, so the judge would not see"),
        ({"template": "{A} or {B}} or {"}, r"^judge\.template: a single '\}' in"),
        ({"batch_size": 0}, r"^judge\.batch_size: at least 1 is expected, found 0"),
        (
            {"buckets": (64, 64)},
            r"^judge\.buckets: increasing positive integers are expected, found \[64, 64\]",
        ),
        ({"on_long": "cut"}, r"^judge\.on_long: 'error' or 'no_verdict' is expected, found 'cut'"),
        ({"labels": ("A",)}, r"^judge\.labels: a list of 2 values"),
        ({"rules": RULES}, r"^judge\.rules: weight must be a number from 0 to below 1, found None"),
        ({"rules": {**RULES, "weight": 1}}, r"^judge\.rules: weight must be .* found 1"),
        (
            {"rules": {**RULES, "weight": 0.5, "gat": 1}},
            r"^judge\.rules\.gat: no such field; did you mean 'gate'",
        ),
        ({"rule_judge": None}, r"^judge\.rule_judge is set by the program"),
    ],
)
def test_llm_invalid_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        configs.build(llm, {"name": "llm", **LLM_JUDGE, **changes}, "judge", rule_judge=paraphrase)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"labels": ("A", "Bee")},
            r"^judge\.labels: 'Bee' is 3 tokens of .* \('B', 'e', 'e'\); each label must be",
        ),
        ({"labels": ("A", "")}, r"^judge\.labels: '' is 0 tokens of the judge's tokenizer \(none\)"),
        ({"labels": ("A", "<|im_end|>")}, r"^judge\.labels: '<\|im_end\|>' is 10 tokens"),
        ({"labels": ("A", "A")}, r"^judge\.labels: 'A' and 'A' are the same token"),
        ({"batch_size": 6}, r"^judge\.batch_size 6 is not divisible by mesh\.data x mesh\.fsdp = 4"),
        ({"path": "nowhere"}, "nowhere"),
    ],
)
def test_attach_model_or_mesh_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        attach_llm_judge(build_llm_judge(**changes))


def test_check_missing_column_is_refused(judge):
    with pytest.raises(
        ValueError, match=r"^judge\.template: no column 'input'; the row has: text; \{prompt\}, the"
    ):
        judge.check((), {"text": "x"})
    with pytest.raises(ValueError, match=r"^judge\.template: column 'input' must be text, got \[3\]"):
        judge.check((), {"input": [3]})


# ---- a whole run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run the command line with the policy's starting model as the judge, and with another reference.

    Returns, per run, its folder, its result, the judge's weights and the reference's.
    """
    folder = tmp_path_factory.mktemp("runs")
    write_model(folder / "other", seed=9)
    judge = {**LLM_JUDGE, "path": None, "template": "{text}|{prompt}|{A}|{B}|", "buckets": (64, 96)}
    del judge["rules"]
    out: dict[str, Any] = {"folder": folder}
    taken: dict[str, Any] = {}
    load, evaluator = LLMJudge.load, Evaluator.__init__

    def loading(self, starting):
        load(self, starting)
        taken["judge"] = self._scorer.weights

    def evaluating(self, programs, judge, decode, opponents, **options):
        taken["reference"] = opponents.reference
        evaluator(self, programs, judge, decode, opponents, **options)

    with one_sequence_length(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(LLMJudge, "load", loading)
        patch.setattr(Evaluator, "__init__", evaluating)
        for name, reference in (("shared", None), ("apart", str(folder / "other"))):
            config = tiny_config(folder)
            config.judge = ConfigDict({"name": "llm", "rules": None, **judge})
            config.run_dir, config.steps, config.data.buckets = str(folder / name), 2, (40,)
            config.evaluation.prompts, config.evaluation.reference_samples = 6, 1
            with config.ignore_type():
                config.model.reference = reference
            status, printed, complaint = run_main([f"--config={write_config(folder / f'{name}.py', config)}"])
            assert status == 0, complaint
            out[name] = (folder / name, json.loads(printed.rstrip("\n").split("\n")[-1]), dict(taken))
    return out


def test_run_compiles_only_the_declared_programs(runs):
    for name in ("shared", "apart"):
        _, result, _ = runs[name]
        assert result["compilations_during_run"] == 0
        assert result["judge_queries"] > 0 and result["evaluation_queries"] > 0
        # as in test_train.py, with one prompt bucket and sequence length; and one per bucket of the judge
        assert result["compilations_declared"] == 5 + 1 + 2 * 1 + 2


def test_run_shares_the_policys_starting_weights(runs):
    shared, apart = runs["shared"][2], runs["apart"][2]
    assert shared["judge"] is shared["reference"]
    # with another reference, the judge still is the policy's starting model
    same = jax.tree.map(lambda a, b: bool((a == b).all()), apart["judge"], shared["judge"])
    other = jax.tree.map(lambda a, b: bool((a == b).all()), apart["reference"], shared["judge"])
    assert all(jax.tree.leaves(same)) and not any(jax.tree.leaves(other))


@pytest.mark.parametrize("name", ["shared", "apart"])
def test_run_logs_the_verdicts_of_the_starting_model(runs, name):
    """After the run, the starting model gives the same verdicts again on a mesh of one device."""
    folder, result, _ = runs[name]
    pairs = [pair for pair in read_pairs(folder / "pairs.jsonl") if pair["shown"] is not None]
    assert len(pairs) == result["judge_queries"]
    again = ready(
        (8, 1, 1),
        path=str(runs["folder"] / "model"),
        template="{text}|{prompt}|{A}|{B}|",
        buckets=(96,),
        batch_size=8,
    )
    assert isinstance(again, DeviceJudge)
    verdicts = again(
        [
            Comparison(pair["messages"], pair["row"], *(pair["responses"][i]["text"] for i in pair["shown"]))
            for pair in pairs
        ]
    )
    for pair, verdict in zip(pairs, verdicts, strict=True):
        p = pair["p_first"] if pair["shown"] == [0, 1] else 1 - pair["p_first"]
        assert p == pytest.approx(verdict.p, abs=1e-5)
        first, second = ("policy", "reference") if pair["shown"] == [0, 1] else ("reference", "policy")
        assert pair["scores"][first]["logp"] == pytest.approx(verdict.scores["a"]["logp"], abs=1e-4)
        assert pair["scores"][second]["logp"] == pytest.approx(verdict.scores["b"]["logp"], abs=1e-4)
        assert pair["scores"]["mass"] == pytest.approx(verdict.scores["mass"], rel=1e-4)


def test_run_unjudgeable_prompt_is_refused_before_loading(tmp_path):
    config = tiny_config(tmp_path)
    template = "{missing}|{A}|{B}|"
    judge = {"path": None, "template": template, "buckets": (64, 96)}
    config.judge = ConfigDict({"name": "llm", **LLM_JUDGE, **judge})
    status, _, complaint = run_main([f"--config={write_config(tmp_path / 'config.py', config)}"])
    assert status == 2
    where = f"{tmp_path / 'train.jsonl'}, row 1"
    assert complaint.startswith(
        f"xpo_jax: {where}: judge.template: no column 'missing'; the row has: text, number;"
    )
    assert not (tmp_path / "run").exists()
