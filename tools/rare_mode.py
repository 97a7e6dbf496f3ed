"""Does exploration pay in a network? A small Qwen2 with a rare good answer, trained by `xpo_jax.train.train` itself.

    python -m tools.rare_mode --out=FOLDER [--mass=0.001] [--updates=1]

The bandit of tools/research/bandit.py as text: an answer is a letter, A to M, and a digit, 0 to 5. Five letters are
common in the reference, eight are rare with the same probability each, and one of these is the good one: reward 3,
the others 0.5 to 1 (common), 0 (rare) and -1 (any other text). A model of two layers is first fitted to give such
answers, and is then policy and reference of ordinary runs: sampling, judge, update, logs. So unlike in the bandit
answers share weights; and nothing is replayed but with --updates above 1, which makes so many updates for each
batch of verdicts, all but the first on past pairs.

Counted are the verdicts until half of a batch of the policy's answers begin with the good letter; the optimum's share
is over nine tenths. Shown for each alpha / beta and seed are these verdicts, "> n" where the run ended before; the
share of good answers at the end; and the share of all the policy's answers that are no letter with a digit.

Examples:
  python -m tools.rare_mode --out=build/rare_mode                  five seeds of three arms, some ten minutes
  python -m tools.rare_mode --out=build/rare_mode --mass=0.03      a good answer that is not so rare
  python -m tools.rare_mode --out=build/rare_mode --updates=4      with replay

A run that is in FOLDER already is read, not done again. Exit status: 0, or 2 for invalid input.
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
from tools.cli import Parser, exit_status
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
STRENGTHS, SEEDS = (0.0, 0.02, 0.1), 5
BETA, STEPS, BATCH = 0.2, 400, 64
# With alpha 0 and seed 0 the policy is there earlier with 1e-2, and loses it again for a while.
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
    """A judge for the config: draws each verdict from Bradley-Terry's model of the letters' rewards."""
    rewards = dict(zip(LETTERS, map(float, bandit.make_bandit(0.0, beta=BETA).rewards), strict=True))
    good = {letter + digit: rewards[letter] for letter in LETTERS for digit in DIGITS}
    chance = random.Random(seed)

    def ask(comparisons: Sequence[Comparison]) -> list[str]:
        gaps = [good.get(c.a, -1.0) - good.get(c.b, -1.0) for c in comparisons]
        return ["A" if chance.random() < 1 / (1 + math.exp(-gap)) else "B" for gap in gaps]

    return ask


# ---- the reference ----------------------------------------------------------------------------------


def build_model(folder: Path, mass: float, steps: int = 500) -> float:
    """Fit a small model to the reference's answers, and write its folder.

    Returns:
      The probability that its answers to a prompt begin with the good letter.
    """
    embedded_folder = model_folder.model_folder("embedded")
    folder.mkdir(parents=True, exist_ok=True)
    for file in embedded_folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copyfile(file, folder / file.name)
    about = {**json.loads((embedded_folder / "config.json").read_text()), **SHAPE}
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")
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
    ids = lambda text: tokenizer.convert_tokens_to_ids(text)  # noqa: E731
    answers = np.int32([[ids(a), ids(b), tokenizer.eos_token_id] for a in LETTERS for b in DIGITS])
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
        found = logps(params)  # f32[S B]
        rest = 1 - jnp.exp(jax.nn.logsumexp(found, axis=0))  # what goes to other texts
        return jnp.mean((found - wanted) ** 2) + 10 * jnp.mean(jnp.abs(rest))

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
    """The embedded default with this model, judge and prompts."""
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


def shares(run: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a run's log of pairs says, by step.

    Returns:
      f64[steps], the share of the policy's answers that begin with the good letter; f64[steps], the share that is
      no letter with a digit; i64[steps], verdicts by then.
    """
    good, other, asked = np.zeros((3, STEPS))
    with open(run / "pairs.jsonl", encoding="utf-8") as file:
        for pair in map(json.loads, file):
            text, step = pair["responses"][0]["text"], pair["step"]
            known = len(text) == 2 and text[0] in LETTERS and text[1] in DIGITS
            good[step] += known and text[0] == GOOD
            other[step] += not known
            asked[step] += pair["shown"] is not None
    return good / BATCH, other / BATCH, np.cumsum(asked).astype(int)


def run(argv: Sequence[str]) -> int:
    """Train all of them and show what came of it."""
    parser = Parser(prog="python -m tools.rare_mode", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where model and runs are, or are put")
    parser.add_argument("--mass", type=float, default=0.001, help="of each rare letter (0.001)")
    parser.add_argument("--updates", type=int, default=1, help="for each batch of verdicts (1: no replay)")
    options = parser.parse_args(argv)
    folder = options.out / f"{options.mass:g}"
    if not (folder / "model" / "model.safetensors").is_file():
        build_model(folder / "model", options.mass)
    for name, n in (("train", 512), ("held_out", 8)):
        rows = (json.dumps({"text": text}) + "\n" for text in _prompts(random.Random(name), n))
        (folder / f"{name}.jsonl").write_text("".join(rows))
    cells = []
    for ratio in STRENGTHS:
        found = []
        for seed in range(SEEDS):
            name = f"updates_{options.updates}_alpha_{ratio:g}_seed_{seed}"
            with open(folder / f"{name}.txt", "w") as log, contextlib.redirect_stdout(log):
                train(run_config(folder, name, ratio=ratio, seed=seed, updates=options.updates))
            good, other, asked = shares(folder / name)
            there = good >= 0.5
            count = f"{asked[there.argmax()]}" if there.any() else f"> {asked[-1]}"
            found.append((count, f"{good[-10:].mean():.2f}", f"{other.mean():.3f}"))
            print(name, *found[-1], file=sys.stderr, flush=True)
        cells.append([f"{ratio:g}", *(", ".join(column) for column in zip(*found, strict=True))])
    heads = [
        "alpha/beta",
        "verdicts, by seed",
        "good share in the last ten batches",
        "other texts, of all",
    ]
    print(text_table(heads, cells, width=150))
    return 0


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    return exit_status("rare_mode", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
