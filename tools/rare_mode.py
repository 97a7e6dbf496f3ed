"""Measure whether exploration pays in a network: a small Qwen2 with a rare good answer, trained by ordinary runs.

    python -m tools.rare_mode --out=FOLDER [--mass=0.001] [--updates=1]

This is the bandit of tools/research/bandit.py as text: an answer is a letter, A to M, and a digit, 0 to 5. Five
letters are common in the reference, eight are rare and equally likely, and one of these is the good one: its reward is
3, that of the others 0.5 to 1 (common), 0 (rare) and -1 (any other text). A model of two layers is fitted to these
probabilities, and is then policy and reference of ordinary runs: sampling, judge, update, logs. So, unlike in the
bandit, answers share weights; and nothing is replayed unless --updates is above 1, the number of updates for each
batch of verdicts, all but the first on past pairs.

It counts the verdicts until half of a batch of the policy's answers begin with the good letter; for the optimum, more
than nine tenths do. It prints, for each alpha / beta and seed, these verdicts ("> n" if the run ended before), the
fraction of good answers at the end, and the fraction of the policy's answers that are not a letter and a digit.

Examples:
  python -m tools.rare_mode --out=build/rare_mode                  five seeds of three arms, about ten minutes
  python -m tools.rare_mode --out=build/rare_mode --mass=0.03      a less rare good answer
  python -m tools.rare_mode --out=build/rare_mode --updates=4      with replay

Runs that FOLDER already holds are read and not repeated. Exit status: 0 done, 2 invalid input (one line explains),
130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from configs.paraphrase import embedded
from tools.cli import Parser, exit_status, path_argument
from tools.research import bandit
from xpo_jax.algorithm.logps import response_logps
from xpo_jax.models.hf import model_folder, weights
from xpo_jax.models.registry import family
from xpo_jax.reporting.console import text_table
from xpo_jax.reporting.summary import progress
from xpo_jax.train import train
from xpo_jax.values import Comparison

LETTERS, DIGITS = "ABCDEFGHIJKLM", "012345"
GOOD = LETTERS[bandit.COMMON]
RATIOS, SEEDS = (0.0, 0.02, 0.1), 5
BETA, STEPS, BATCH = 0.2, 400, 64
# With 1e-2, alpha 0 and seed 0 reach the goal earlier, but lose it again for a while.
LEARNING_RATE = 3e-3
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


def run_config(folder: Path, name: str, *, ratio: float, seed: int, updates: int = 1) -> ConfigDict:
    """Return the embedded default with this model, judge and prompts."""
    config = embedded()
    config.run_dir, config.seed = str(folder / name), seed
    config.steps, config.batch_size = STEPS, BATCH
    config.data.train, config.data.held_out = str(folder / "train.jsonl"), str(folder / "held_out.jsonl")
    config.data.template = ({"role": "user", "content": TEMPLATE},)
    config.data.max_prompt_tokens, config.data.buckets = 24, (24,)
    config.model.path = str(folder / "model")
    config.sampling.max_new_tokens, config.sampling.temperature = 4, 1.0
    config.judge = ConfigDict({"name": "tools.rare_mode:judge", "seed": seed})
    config.loss.beta, config.loss.alpha = BETA, ratio * BETA
    config.replay.updates = updates
    config.optimizer.learning_rate, config.optimizer.schedule = LEARNING_RATE, "constant"
    config.layout.micro_batch_rows = BATCH // 4
    config.evaluation.prompts, config.evaluation.reference_samples = 8, 1
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
    parser.add_argument(
        "--updates", type=int, default=1, help="updates for each batch of verdicts (1: no replay)"
    )
    options = parser.parse_args(argv)
    folder = options.out / f"{options.mass:g}"
    if not (folder / "model" / "model.safetensors").is_file():
        build_model(folder / "model", options.mass)
    for name, n in (("train", 512), ("held_out", 8)):
        rows = (json.dumps({"text": text}) + "\n" for text in _prompts(random.Random(name), n))
        (folder / f"{name}.jsonl").write_text("".join(rows))
    cells = []
    for ratio in RATIOS:
        results = []
        for seed in range(SEEDS):
            name = f"updates_{options.updates}_alpha_{ratio:g}_seed_{seed}"
            with open(folder / f"{name}.txt", "w") as log, contextlib.redirect_stdout(log):
                train(run_config(folder, name, ratio=ratio, seed=seed, updates=options.updates))
            good, other, verdicts = fractions(folder / name)
            at_goal = good >= 0.5
            count = f"{verdicts[at_goal.argmax()]}" if at_goal.any() else f"> {verdicts[-1]}"
            results.append((count, f"{good[-10:].mean():.2f}", f"{other.mean():.3f}"))
            print(name, *results[-1], file=sys.stderr, flush=True)
        cells.append([f"{ratio:g}", *(", ".join(column) for column in zip(*results, strict=True))])
    heads = [
        "alpha/beta",
        "verdicts, by seed",
        "good share in the last ten batches",
        "other texts, of all",
    ]
    print(text_table(heads, cells, width=150))
    return 0


def main(argv: Sequence[str]) -> int:
    """Run the experiment; return the exit status."""
    return exit_status("rare_mode", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
