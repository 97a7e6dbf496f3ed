"""Whole runs with adapters: what they save, that they resume to the same bits, what they export and start from."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import Counting
from flax import traverse_util
from tiny_run import changed_config, killed_at_update, read_metrics, run_contents, run_name

from xpo_jax.algorithm.logps import response_logps
from xpo_jax.config import loader
from xpo_jax.experiment import startup
from xpo_jax.judges.llm import LLMJudge
from xpo_jax.models import lora, registry
from xpo_jax.models.hf import adapter, model_folder
from xpo_jax.models.lora import LoRA

pytestmark = pytest.mark.usefixtures("one_device")
ADAPTED = {"lora__rank": 4}


@pytest.fixture(autouse=True)
def reset_judge():
    Counting.reset()


@pytest.fixture(scope="module")
def whole(run, folder):
    """Return the folder of an uninterrupted run, and the number of its comparisons."""
    Counting.reset()
    status, out, err, queries = run("whole", **ADAPTED)
    assert status == 0, err
    shown = " ".join(out.split())
    assert "trained LoRA of rank 4 and scale 2 on q_proj, v_proj" in shown
    assert "8,208, computing in float32; 1,344 are trained beside them" in shown
    return folder / "whole", queries


def settings_of(path):
    """Return the adapters of a finished run."""
    return LoRA(**json.loads((path / "config.json").read_text())["lora"])


def contents(path):
    return {**run_contents(path), "adapter": (path / "adapter" / "adapter_model.safetensors").read_bytes()}


def test_run_begins_at_the_reference_and_learns(whole):
    rows = read_metrics(whole[0])
    assert rows[0]["eval/kl"] == 0.0
    assert rows[1]["objective/kl"] == 0.0 and rows[1]["rewards/margins"] == 0.0
    assert all(row["grad_norm"] > 0 for row in rows[1:]) and abs(rows[-1]["eval/kl"]) > 1e-3


def test_checkpoint_holds_adapters_and_their_moments_alone(whole, folder):
    described = json.loads((whole[0] / "checkpoints" / "6" / "checkpoint.json").read_text())["leaves"]
    weights = {name for name, kind in described.items() if not kind.endswith("[]")}
    assert weights and all(name.endswith(("/lora_a", "/lora_b")) for name in weights)
    params = {name for name in weights if name.startswith("params/")}
    assert len(params) == 2 * 5 and len(weights) == 3 * len(params)
    stored = sum(file.stat().st_size for file in (whole[0] / "adapter").iterdir())
    assert stored < (folder / "model" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("at", [2, 5])
def test_resume_after_a_kill_gives_the_same_bits(run, whole, folder, at):
    name = f"killed_{at}"
    with killed_at_update(at):
        run(name, **ADAPTED)
    first = len(Counting.comparisons)
    status, out, err, second = run(name, **ADAPTED)
    assert status == 0, err
    assert f"after step {at - at % 2}, whose checkpoint is complete" in out
    assert contents(folder / name) == contents(whole[0]) and first + second == whole[1]


def test_resume_with_another_rank_or_scale_is_refused(run, folder):
    with killed_at_update(3):
        run("changed", **ADAPTED)
    status, _, err, _ = run("changed", lora__rank=4, lora__alpha=4.0)
    assert status == 2 and "lora.alpha: 8.0 there, 4.0 here" in err
    status, _, err, _ = run("changed", "--accept-changes", lora__rank=2)
    assert status == 2 and "does not fit this model or optimizer" in err


@pytest.mark.parametrize(
    "changes", [{"model__reference_every_steps": 3, "evaluation__every_steps": 0}, {"replay__updates": 2}]
)
def test_renewed_reference_and_replay_resume_to_the_same_bits(run, folder, changes):
    name = next(iter(changes)).partition("__")[0]
    status, _, err, _ = run(f"{name}_whole", **ADAPTED, **changes)
    assert status == 0, err
    with killed_at_update(5):
        run(f"{name}_killed", **ADAPTED, **changes)
    assert run(f"{name}_killed", **ADAPTED, **changes)[0] == 0
    assert contents(folder / f"{name}_killed") == contents(folder / f"{name}_whole")
    kl = [row["objective/kl"] for row in read_metrics(folder / f"{name}_whole")[1:]]
    if (
        name == "model"
    ):  # right after its renewal the reference is the policy, an adapter beside the same base
        assert [value == 0.0 for value in kl] == [True, False, False, True, False, False]


def test_offline_run_learns_an_adapter_from_recorded_pairs(run, whole, folder):
    changes = {"offline": {"pairs": str(whole[0] / "pairs.jsonl")}, "evaluation__every_steps": 0}
    status, _, err, _ = run("offline", **ADAPTED, **changes)
    assert status == 0, err
    assert settings_of(folder / "offline").rank == 4 and (folder / "offline" / "adapter").is_dir()
    assert abs(read_metrics(folder / "offline")[-1]["eval/kl"]) > 1e-3


def test_llm_judge_of_the_same_model_shares_the_arrays_of_the_base(folder, monkeypatch):
    """With another reference, too; the judge has no adapter."""
    taken = {}
    load, begin = LLMJudge.load, startup.start

    def loading(self, starting):
        load(self, starting)
        taken["judge"] = self._scorer.weights

    def beginning(context):
        taken["start"] = begin(context)
        return taken["start"]

    monkeypatch.setattr(LLMJudge, "load", loading)
    monkeypatch.setattr(startup, "start", beginning)
    judge = {"name": "llm", "rules": None, "path": None, "template": "{text}|{A}|{B}|", "labels": ("A", "B")}
    changes = {
        "judge": {
            **judge,
            "batch_size": 8,
            "buckets": (96,),
            "on_long": "error",
            "chat_template_arguments": None,
        },
        "steps": 2,
    }
    status, _, err = run_name(folder, "judged", changed_config(folder, **ADAPTED, **changes))
    assert status == 0, err
    base, policy = (traverse_util.flatten_dict(taken["start"][i]) for i in (1, 2))
    judged = traverse_util.flatten_dict(taken["judge"])
    assert judged.keys() == base.keys() and all(judged[path] is leaf for path, leaf in base.items())
    assert all(policy[path] is leaf for path, leaf in base.items()) and policy.keys() > base.keys()


# ---- exports --------------------------------------------------------------------------------------


def logps(adapters, params, config):
    """Return f32[2 4], the log-probabilities of drawn responses under a model in its stacked layout."""
    graphdef, _ = registry.abstract_model(config, stacked=True, adapters=adapters)
    rng = np.random.default_rng(0)
    prompts, tokens = (rng.integers(0, 256, shape).astype(np.int32) for shape in ((4, 9), (2, 4, 8)))
    score = jax.jit(
        lambda params: (
            response_logps(
                graphdef,
                params,
                prompts,
                jnp.full(4, 9),
                tokens,
                jnp.full((2, 4), 8),
                temperature=1.0,
                vocab_size=259,
                chunk_tokens=64,
            ).logps
        )
    )
    return jax.device_get(score(params))


def test_merged_export_is_the_base_with_the_adapter_applied(whole, folder):
    path = whole[0]
    adapters, config = settings_of(path), model_folder.read_config(path / "export")
    trained = adapter.load_adapter(path / "adapter", config, adapters)
    base, merged = (
        model_folder.load_params(source, config) for source in (folder / "model", path / "export")
    )
    applied = logps(adapters, lora.join(base, trained), config)
    np.testing.assert_allclose(logps(lora.OFF, merged, config), applied, rtol=1e-5)
    assert np.abs(logps(lora.OFF, base, config) - applied).max() > 1e-3
    ab = traverse_util.flatten_dict(jax.tree.map(np.float64, trained))
    for name, weight in traverse_util.flatten_dict(base).items():
        new = traverse_util.flatten_dict(merged)[name]
        if (*name[:-1], "lora_a") not in ab or name[-1] != "kernel":
            np.testing.assert_array_equal(new, weight)
            continue
        delta = 2.0 * ab[(*name[:-1], "lora_a")] @ ab[(*name[:-1], "lora_b")]  # 8 / 4
        np.testing.assert_allclose(new, np.float64(weight) + delta, rtol=0, atol=1e-6)
        assert np.abs(delta).max() > 1e-4


# ---- starts ---------------------------------------------------------------------------------------


def test_run_starts_from_an_adapter_and_refers_to_it(run, whole, folder):
    start = {"lora__start": str(whole[0] / "adapter"), "evaluation__every_steps": 0, "steps": 2}
    status, _, err, _ = run("second", **ADAPTED, **start)
    assert status == 0, err
    rows = read_metrics(folder / "second")
    assert rows[0]["eval/kl"] == 0.0 and rows[1]["objective/kl"] == 0.0
    ours, before = (
        json.loads((path / "environment.json").read_text())["weights"]
        for path in (folder / "second", whole[0])
    )
    assert ours["policy"] == ours["reference"] != before["reference"]
    assert "lora.start" in json.loads((folder / "second" / "inputs.json").read_text())


def test_run_from_an_adapter_against_the_base_begins_with_a_kl(run, whole, folder):
    start = {"lora__start": str(whole[0] / "adapter"), "evaluation__every_steps": 0, "steps": 2}
    status, _, err, _ = run("against", **ADAPTED, **start, model__reference=str(folder / "model"))
    assert status == 0, err
    rows = read_metrics(folder / "against")
    assert abs(rows[0]["eval/kl"]) > 1e-3 and abs(rows[1]["objective/kl"]) > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora__rank": 4, "lora__start": "nowhere"}, "lora.start: nowhere has no adapter_config.json"),
        ({"lora__rank": 0, "lora__start": "x"}, "lora.start is set, but rank is 0"),
        ({"lora__rank": 2, "lora__targets": ("wq",)}, "lora.targets: 'wq' names no linear map of this model"),
    ],
)
def test_impossible_settings_are_one_line(run, folder, changes, message):
    status, _, err, _ = run("impossible", **changes)
    assert status == 2 and err.splitlines()[-1].startswith(f"xpo_jax: {message}"), err
    assert not (folder / "impossible").exists()


def test_default_configs_list_the_group_with_every_field():
    for spec in ("paraphrase", "paraphrase:some/model", "offline_dpo"):
        group = loader.load(spec, ()).lora
        assert set(group) == {"rank", "alpha", "targets", "rslora", "start"} and group.rank == 0
