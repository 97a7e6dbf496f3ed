"""What CONTRIBUTING.md promises: a loss, a judge, a model family and a source are added without an edit of the package.

The toy parts stand in tests/extending; CONTRIBUTING.md shows pieces of them.
"""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from extending.toy_family import FAMILY, BigramConfig
from extending.toy_judge import MostOften
from extending.toy_loss import Hinge
from extending.toy_source import sums
from fake_models import write_tokenizer
from ml_collections import ConfigDict
from safetensors.numpy import save_file
from tiny_run import run_main, tiny_config, write_config
from transformers import AutoTokenizer

from xpo_jax.algorithm.losses import LOSSES
from xpo_jax.algorithm.sampler import make_sampler, row_keys
from xpo_jax.algorithm.sampling import Sampling
from xpo_jax.config.loss import make_loss
from xpo_jax.data.prompts import load_prompts
from xpo_jax.experiment.judge_factory import make_judge
from xpo_jax.judges import JUDGES
from xpo_jax.judges.answers import compare
from xpo_jax.models import registry
from xpo_jax.models.hf import model_folder
from xpo_jax.models.registry import FAMILIES
from xpo_jax.runtime.rng import Stream
from xpo_jax.values import Comparison

ROOT = Path(__file__).parents[1]
RECIPES = re.findall(
    r"^```python\n# (tests/extending/\w+\.py)\n(.*?)^```$",
    (ROOT / "CONTRIBUTING.md").read_text(),
    re.DOTALL | re.MULTILINE,
)


def test_contributing_shows_a_recipe_for_every_toy_part():
    shown = {path for path, _ in RECIPES}
    assert shown == {f"tests/extending/{path.name}" for path in (ROOT / "tests" / "extending").glob("*.py")}


@pytest.mark.parametrize(("path", "code"), RECIPES)
def test_recipe_code_is_the_code_that_is_tested(path, code):
    pieces = [piece for piece in re.split(r"^\.\.\.\n", code, flags=re.MULTILINE) if piece.strip()]
    source = (ROOT / path).read_text()
    for piece in pieces:
        assert piece.strip("\n") in source


# ---- a judge ----------------------------------------------------------------------------------------

COMPARISONS = [Comparison((), {}, a, b) for a, b in (("see", "sea"), ("sea", "see"), ("tea", "sea"))]


@pytest.mark.parametrize("name", ["extending.toy_judge:MostOften", "most_often"])
def test_judge_is_made_by_its_name_with_its_settings(name, monkeypatch):
    monkeypatch.setitem(JUDGES, "most_often", MostOften)
    judge = make_judge({"name": name, "text": "e"}, "judge")
    verdicts = [judged.verdict for judged in compare(judge, COMPARISONS, both_orders=True)]
    assert [verdict.p for verdict in verdicts] == [1.0, 0.0, 0.5]
    assert verdicts[0].scores["a"] == 2
    assert verdicts[0].scores["b"] == 1


@pytest.mark.parametrize(
    ("group", "field"),
    [({"text": ""}, "judge.text"), ({"text": 3}, "judge.text"), ({"word": "e"}, "judge.word")],
)
def test_judge_with_a_wrong_setting_is_refused_by_field(group, field):
    with pytest.raises(ValueError, match=rf"^{field}\b|judge: {field}\b"):
        make_judge({"name": "extending.toy_judge:MostOften", **group}, "judge")


# ---- a source ---------------------------------------------------------------------------------------


def test_source_is_read_by_its_name(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path))
    data = load_prompts(
        train="extending.toy_source:sums",
        held_out=["extending.toy_source:sums"],
        select=None,
        rename=None,
        template=({"role": "user", "content": "{text}"},),
        column=None,
        filter_tokens=None,
        filter_length=False,
        max_prompt_tokens=40,
        buckets=(40,),
        on_long="error",
        on_bad_row="error",
        on_extra_keys="error",
        on_assistant_last="error",
        deduplicate=False,
        take=None,
        shuffle=False,
        chat_template_arguments=None,
        tokenizer=tokenizer,
        max_new_tokens=8,
        check=None,
    )
    assert [dict(prompt.row.values) for prompt in data.train.prompts] == sums()
    assert [prompt.messages[0]["content"] for prompt in data.held_out.prompts] == [
        row["text"] for row in sums()
    ]
    batch = data.train_batches(4, seed=0)[0]
    assert batch.rows[1] == {"text": "0+1=", "sum": 1}


# ---- a loss -----------------------------------------------------------------------------------------

LOSS = {
    "second_candidate": "reference",
    "candidates": 1,
    "pairing": None,
    "beta": 0.1,
    "alpha": 1e-3,
    "entropy_weight": 0.0,
    "unfinished_loses": False,
    "bonus_clip": 500.0,
    "bonus": "linear",
    "bonus_sample": "second",
    "flip_rate": 0.0,
    "margin": 0.25,
}


@pytest.mark.parametrize("name", ["extending.toy_loss:Hinge", "hinge"])
def test_loss_is_made_by_its_name_with_its_hyperparameters(name, monkeypatch):
    monkeypatch.setitem(LOSSES, "hinge", Hinge)
    settings, loss = make_loss({"name": name, **LOSS})
    assert loss == Hinge(bonus_clip=500.0, margin=0.25)
    policy_logps, ref_logps = (
        jnp.float32([[-3.0, -9.0], [-5.0, -4.0]]),
        jnp.float32([[-4.0, -4.0], [-4.0, -4.0]]),
    )
    terms = loss(policy_logps, ref_logps, jnp.float32([1.0, 0.5]), alpha=0.0, beta=0.1)
    np.testing.assert_allclose(terms.z, [2.0, -5.0])
    # 0.25 - 0.1 * 2; the mean of 0.25 + 0.1 * 5 and max(0, 0.25 - 0.1 * 5)
    np.testing.assert_allclose(terms.preference, [0.05, 0.375], rtol=1e-6)
    assert settings.beta == 0.1


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"margin": "wide"}, "loss.margin"),
        ({"margin": 0.0}, "margin"),
        ({"margn": 1.0}, "loss.margn.*margin"),
        ({"bonus_clip": -1.0}, "bonus_clip"),
    ],
)
def test_loss_with_a_wrong_hyperparameter_is_refused_by_field(changes, field):
    with pytest.raises(ValueError, match=field):
        make_loss({"name": "extending.toy_loss:Hinge", **LOSS, **changes})


def test_loss_that_has_no_minimum_is_refused_by_its_check():
    settings, loss = make_loss({"name": "extending.toy_loss:Hinge", **LOSS, "alpha": 0.2})
    with pytest.raises(ValueError, match=r"loss at step 0.*lower loss\.alpha"):
        settings.coefficients(loss, steps=1)


# ---- a model family -----------------------------------------------------------------------------------

V = 264  # five rows more than the byte tokenizer has tokens
COUNTING = BigramConfig(
    vocab_size=V,
    hidden_size=V,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=4,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    max_position_embeddings=128,
)


@pytest.fixture
def bigram(monkeypatch, tmp_path):
    """Register the family, and write the folder of a model whose next token is the last one plus 1."""
    monkeypatch.setitem(FAMILIES, "bigram", FAMILY)
    folder = write_tokenizer(tmp_path / "model")
    about = {"model_type": "bigram", "architectures": ["BigramForCausalLM"], "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(about | dataclasses.asdict(COUNTING)))
    tables = {
        "model.embed_tokens.weight": np.eye(V, dtype=np.float32),
        "lm_head.weight": 4 * np.roll(np.eye(V, dtype=np.float32), 1, axis=0),
    }
    save_file(tables, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_family_is_read_loaded_and_sampled_by_the_model_type_of_its_folder(bigram):
    config = model_folder.read_config(bigram)
    assert config == COUNTING
    params = registry.family(config).unstack(model_folder.load_params(bigram, config))
    graphdef, _ = registry.abstract_model(config, stacked=False)
    greedy = Sampling(
        max_new_tokens=5, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0
    )
    sampler = make_sampler(graphdef, greedy, vocab_size=259, end_tokens=(13,), pad_token=0)
    tokens, lengths = jnp.int32([[7, 30, 0], [1, 2, 9]]), jnp.int32([2, 3])
    keys = row_keys(0, Stream.TRAINING, 0, jnp.arange(2), 0)
    samples = jax.jit(sampler)(params, tokens, lengths, jnp.ones(2, bool), keys)
    np.testing.assert_array_equal(samples.tokens, [[31, 32, 33, 34, 35], [10, 11, 12, 13, 0]])
    np.testing.assert_array_equal(samples.lengths, [5, 4])


def test_folder_of_a_family_that_is_not_registered_is_refused_by_model_type(bigram, monkeypatch):
    monkeypatch.delitem(FAMILIES, "bigram")
    with pytest.raises(ValueError, match=r"model_type.*bigram.*qwen2"):
        model_folder.read_config(bigram)


# ---- all of them --------------------------------------------------------------------------------------


def test_run_trains_with_a_toy_loss_judge_family_and_source(bigram, tmp_path, one_device):
    config = tiny_config(tmp_path)
    source = {"train": "extending.toy_source:sums", "held_out": "extending.toy_source:sums"}
    config.update({"steps": 2, "data": source, "evaluation": {"prompts": 8, "reference_samples": 1}})
    config.unlock()
    config.judge = ConfigDict({"name": "extending.toy_judge:MostOften", "text": "e"})
    config.loss = ConfigDict({"name": "extending.toy_loss:Hinge", **LOSS})
    status, _, err = run_main([f"--config={write_config(tmp_path / 'config.py', config)}"])
    assert status == 0, err
    run = tmp_path / "run"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in metrics if "loss/dpo" in line)
    assert first["loss/dpo"] == pytest.approx(
        LOSS["margin"]
    )  # the policy is the reference: z is 0 in every pair
    pairs = [json.loads(line) for line in (run / "pairs.jsonl").read_text().splitlines()]
    assert {pair["row"]["sum"] for pair in pairs} <= {row["sum"] for row in sums()}
    assert any("'e' occurs" in pair["reason"] for pair in pairs)
    assert model_folder.read_config(run / "export") == COUNTING
