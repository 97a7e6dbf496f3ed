"""Measure whether exploration pays in a network: a small Qwen2 with a rare good answer, trained by ordinary runs.

    python -m tools.rare_mode --out=FOLDER [--factors] [--mass=0.001] [--jobs=2]

This is the bandit of tools/research/bandit.py as text: an answer is a letter, A to M, and a digit, 0 to 5. Five
letters are common in the reference, eight are rare and equally likely, and one of these is the good one: its reward is
3, that of the others 0.5 to 1 (common), 0 (rare) and -1 (any other text). A model of two layers is fitted to these
probabilities, and is then policy and reference of ordinary runs: sampling, judge, update, logs. So, unlike in the
bandit, answers share weights; and nothing is replayed unless an arm says so.

It counts the verdicts until half of a batch of the policy's answers begin with the good letter; for the optimum, more
than nine tenths do. It prints, for each arm and seed, these verdicts ("> n" if the run ended before), the fraction of
good answers at the end, and the fraction of the policy's answers that are not a letter and a digit.

--factors adds the arms that change one thing each: replay, SGD, no junk drawn, both candidates from the policy, a
second candidate at a higher temperature, the bounded bonus, the bonus on the rejected answer, and alpha falling to 0.
Where a factor also matters without a bonus, a second arm has it with alpha 0, to compare with.

Examples:
  python -m tools.rare_mode --out=build/rare_mode                     five seeds of three arms, about ten minutes
  python -m tools.rare_mode --out=build/rare_mode --factors --jobs=2  all arms, more than an hour
  python -m tools.rare_mode --out=build/rare_mode --mass=0.03         a less rare good answer

It can be stopped at any time; runs that FOLDER holds are read and not repeated. Exit status: 0 done, 1 some runs
failed, 2 invalid input (one line explains), 130 interrupted.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from configs.paraphrase import embedded
from tools.cli import Parser, exit_status, path_argument
from tools.research import bandit
from tools.sweep import divide_cores, execute
from tools.sweeps import schedule
from tools.sweeps.spec import Arm, Sweep
from xpo_jax.algorithm.logps import response_logps
from xpo_jax.models.hf import model_folder, weights
from xpo_jax.models.registry import family
from xpo_jax.reporting.console import text_table
from xpo_jax.reporting.summary import progress
from xpo_jax.values import Comparison

LETTERS, DIGITS = "ABCDEFGHIJKLM", "012345"
GOOD = LETTERS[bandit.COMMON]
SEEDS = 5
BETA, STEPS, BATCH = 0.2, 400, 64
# With 1e-2, alpha 0 and seed 0 reach the goal earlier, but lose it again for a while.
LEARNING_RATE = 3e-3
SGD_RATE = 3.0  # of 0.3, 3, 10, 30 and 300 the only one with which alpha 0 and seed 0 reach the goal
TEMPLATE = "{text}"
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def judge(*, seed: int) -> Callable[[Sequence[Comparison]], list[str]]:
    """Return a judge for the config, which draws verdicts from the Bradley-Terry model of the letters' rewards."""
    rewards = dict(zip(LETTERS, map(float, bandit.make_bandit(0.0, beta=BETA).rewards), strict=True))
    good = {letter + digit: rewards[letter] for letter in LETTERS for digit in DIGITS}
    chance = random.Random(seed)

    def ask(comparisons: Sequence[Comparison]) -> list[str]:
        gaps = [good.get(c.a, -1.0) - good.get(c.b, -1.0) for c in comparisons]
        return ["A" if chance.random() < 1 / (1 + math.exp(-gap)) else "B" for gap in gaps]

    return ask


# ---- the reference ----------------------------------------------------------------------------------


def build_model(folder: Path, mass: float, steps: int = 500) -> float:
    """Fit a small model to the reference's probabilities, and write its folder.

    Returns:
      The probability that its answer begins with the good letter.
    """
    embedded_folder = model_folder.model_folder("embedded")
    folder.mkdir(parents=True, exist_ok=True)
    for file in embedded_folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copyfile(file, folder / file.name)
    shape = {**json.loads((embedded_folder / "config.json").read_text()), **SHAPE}
    (folder / "config.json").write_text(json.dumps(shape, indent=2) + "\n")
    config = model_folder.read_config(folder)
    tokenizer = model_folder.load_tokenizer(folder, config)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in _prompts(random.Random(1), 4)
    ]
    length = max(map(len, prompts))
    padded = jnp.int32([p + [0] * (length - len(p)) for p in prompts])
    answers = np.int32(
        [[*tokenizer.convert_tokens_to_ids([a, b]), tokenizer.eos_token_id] for a in LETTERS for b in DIGITS]
    )
    reference = np.float64(bandit.make_bandit(mass, beta=BETA).reference)
    wanted = jnp.float32(np.repeat(np.log(reference / len(DIGITS)), len(DIGITS)))[:, None]
    S, B = len(answers), len(prompts)
    graphdef, state = nnx.split(family(config).module(config, rngs=nnx.Rngs(0), stacked=True))

    def logps(params: Any) -> Any:
        return response_logps(
            graphdef,
            params,
            padded,
            jnp.int32([len(p) for p in prompts]),
            jnp.broadcast_to(jnp.asarray(answers)[:, None], (S, B, 3)),
            jnp.full((S, B), 3),
            temperature=1.0,
            vocab_size=len(tokenizer),
            chunk_tokens=4096,
        ).logps

    def loss(params: Any) -> Any:
        fitted = logps(params)  # f32[S B]
        rest = 1 - jnp.exp(jax.nn.logsumexp(fitted, axis=0))  # probability of other texts
        return jnp.mean((fitted - wanted) ** 2) + 10 * jnp.mean(jnp.abs(rest))

    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    @jax.jit
    def update(params: Any, opt_state: Any) -> Any:
        changes, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
        return optax.apply_updates(params, changes), opt_state

    params = nnx.to_pure_dict(state)
    opt_state = optimizer.init(params)
    for _ in progress(range(steps), "fitting the reference"):
        params, opt_state = update(params, opt_state)
    weights.write_params(folder, params, config, dtype="float32", max_shard_bytes=2**40)
    share = np.exp(np.float64(logps(params))).reshape(len(LETTERS), len(DIGITS), B).sum(axis=1).mean(axis=1)
    print(
        f"the reference gives {GOOD} with {share[bandit.COMMON]:.2e}, one of the letters with {share.sum():.4f}"
    )
    return float(share[bandit.COMMON])


def _prompts(chance: random.Random, n: int) -> list[str]:
    return ["".join(chance.choices("0123456789", k=4)) for _ in range(n)]


# ---- the runs ---------------------------------------------------------------------------------------


class Factor(NamedTuple):
    """Fields of a config that differ from the plain run's, and the values of alpha / beta to run with them."""

    fields: Mapping[str, Any]
    ratios: tuple[float, ...] = (0.0, 0.02)


PLAIN = Factor({}, (0.0, 0.02, 0.1))
FADING = {"kind": "linear", "start": 0.02 * BETA, "end": 0.0, "steps": STEPS // 4}
# Four times alpha, so that the slope at pi = ref is the linear bonus's.
BOUNDED = {"loss.bonus": "bounded", "loss.alpha": 4 * 0.02 * BETA}
FACTORS = {
    "replay": Factor({"replay.updates": 4}),
    # An eps far above every gradient makes Adam into SGD with momentum b1, at learning_rate / eps.
    "SGD": Factor({"optimizer.eps": 1e3, "optimizer.learning_rate": 1e3 * SGD_RATE}),
    # No text but a letter and a digit is drawn: a rare letter has 0.003 of the likeliest token's probability.
    "no junk drawn": Factor({"sampling.min_p": 5e-4}),
    "two of the policy": Factor({"loss.second_candidate": "policy"}),
    "two of the policy, replay": Factor({"loss.second_candidate": "policy", "replay.updates": 4}),
    "second at temperature 2": Factor({"sampling.second_temperature": 2.0}),
    "bounded": Factor(BOUNDED, (0.02,)),
    "two of the policy, replay, bounded": Factor(
        {"loss.second_candidate": "policy", "replay.updates": 4, **BOUNDED}, (0.02,)
    ),
    "on the rejected": Factor({"loss.bonus_sample": "rejected"}, (0.02,)),
    "alpha to 0": Factor({"loss.alpha": FADING}, (0.02,)),
    "replay, alpha to 0": Factor({"replay.updates": 4, "loss.alpha": FADING}, (0.02,)),
}


def arms(folder: Path, *, factors: bool) -> tuple[Arm, ...]:
    """Return the arms: a factor at one alpha / beta each."""
    chosen = {"plain": PLAIN} | (FACTORS if factors else {})
    made = []
    for name, factor in chosen.items():
        for ratio in factor.ratios:
            slug = f"{name} {ratio:g}".replace(",", "").replace(" ", "_")
            fields = {"steps": STEPS, "loss.alpha": ratio * BETA, "judge.seed": "{seed}", **factor.fields}
            config = f"{Path(__file__)}:{folder}"
            made.append(Arm(f"{name}, {ratio:g}", slug, config, fields, None, tuned=False))
    return tuple(made)


def get_config(folder: str) -> ConfigDict:
    """Return the embedded default with this model, judge and prompts."""
    config = embedded()
    config.steps, config.batch_size = STEPS, BATCH
    config.data.train, config.data.held_out = f"{folder}/train.jsonl", f"{folder}/held_out.jsonl"
    config.data.template = ({"role": "user", "content": TEMPLATE},)
    config.data.max_prompt_tokens, config.data.buckets = 24, (24,)
    config.model.path = f"{folder}/model"
    config.sampling.max_new_tokens, config.sampling.temperature = 4, 1.0
    config.judge = ConfigDict({"name": "tools.rare_mode:judge", "seed": 0})
    config.judging.max_indecisive_steps = None  # an arm that collapses is a result, too
    config.loss.beta, config.loss.alpha = BETA, 0.0
    config.optimizer.learning_rate, config.optimizer.schedule = LEARNING_RATE, "constant"
    config.layout.micro_batch_rows = BATCH // 4
    config.evaluation.prompts, config.evaluation.reference_samples = 8, 1
    config.checkpoint.every_steps = None
    config.logging.table_every_steps, config.logging.tensorboard = STEPS, False
    return config


def fractions(run: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read a run's pairs log.

    Returns:
      By step, f64[steps], the fraction of the policy's answers that begin with the good letter; f64[steps], the
      fraction that is not a letter and a digit; i64[steps], verdicts so far.
    """
    good, other, verdicts = np.zeros((3, STEPS))
    with open(run / "pairs.jsonl", encoding="utf-8") as file:
        for pair in map(json.loads, file):
            text, step = pair["responses"][0]["text"], pair["step"]
            known = len(text) == 2 and text[0] in LETTERS and text[1] in DIGITS
            good[step] += known and text[0] == GOOD
            other[step] += not known
            verdicts[step] += pair["shown"] is not None
    return good / BATCH, other / BATCH, np.cumsum(verdicts).astype(int)


def run(argv: Sequence[str]) -> int:
    """Train all runs and print the results; return the exit status."""
    parser = Parser(prog="python -m tools.rare_mode", description=__doc__)
    parser.add_argument("--out", type=path_argument, required=True, help="folder of the model and the runs")
    parser.add_argument("--mass", type=float, default=0.001, help="probability of each rare letter (0.001)")
    parser.add_argument("--factors", action="store_true", help="add the arms that change one thing each")
    parser.add_argument(
        "--jobs", type=int, default=1, help="concurrent runs, each on its part of the cores (1)"
    )
    options = parser.parse_args(argv)
    cores, folder = divide_cores(options.jobs), options.out / f"{options.mass:g}"
    if not (folder / "model" / "model.safetensors").is_file():
        build_model(folder / "model", options.mass)
    for name, n in (("train", 512), ("held_out", 8)):
        rows = (json.dumps({"text": text}) + "\n" for text in _prompts(random.Random(name), n))
        (folder / f"{name}.jsonl").write_text("".join(rows))
    sweep = Sweep(folder / "runs", arms(folder, factors=options.factors), tuple(range(SEEDS)), None)
    schedule.check(sweep)
    ended, failures = execute(sweep, cores)
    heads = ["alpha/beta", "verdicts, by seed", "good share in the last ten batches", "other texts, of all"]
    cells = [[arm.name.removeprefix("plain, "), *_columns(sweep, arm, ended)] for arm in sweep.arms]
    print(text_table(heads, cells, width=150))
    for line in failures:
        print(f"rare_mode: {line}", file=sys.stderr)
    return int(bool(failures))


def _columns(sweep: Sweep, arm: Arm, ended: schedule.Ended) -> list[str]:
    """Return what the runs of an arm came to, by seed: verdicts, good share, other texts."""
    results = []
    for seed in sweep.seeds:
        folder = schedule.run_dir(sweep, arm, None, seed)
        if ended[folder] is None:
            results.append(("failed", "failed", "failed"))
            continue
        good, other, verdicts = fractions(folder)
        at_goal = good >= 0.5
        count = f"{verdicts[at_goal.argmax()]}" if at_goal.any() else f"> {verdicts[-1]}"
        results.append((count, f"{good[-10:].mean():.2f}", f"{other.mean():.3f}"))
    return [", ".join(column) for column in zip(*results, strict=True)]


def main(argv: Sequence[str]) -> int:
    """Run the experiment; return the exit status."""
    return exit_status("rare_mode", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
