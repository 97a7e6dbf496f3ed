"""Build everything under xpo_jax/embedded that is not code: prompts, tokenizer, model, model card.

    python -m tools.build.embedded_model                      # everything, about an hour on two cores
    python -m tools.build.embedded_card                       # only measure the model again and rewrite its card

The model is trained from scratch by supervised fine-tuning on pairs of sentences with one meaning, drawn
from the grammar in xpo_jax/embedded/german, in two phases. In the first, any paraphrase is a target. In the
second, the targets are of two styles, as the answers of a real model are: most stay close to the source, some
are far from it. So preferences have a style to move towards, and validity and diversity to lose on the way.
With one style, the verdicts of a batch would have no direction in common, and XPO would learn slowly.

Training state is saved every few hundred steps under --work, and a killed build resumes from it.

Left out on purpose: corrupted targets. The policy's errors should be those that a small model makes by itself.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tools.build.embedded_card import write_card
from tools.build.embedded_tokenizer import SHAPE, VOCABULARY, build_tokenizer
from xpo_jax.algorithm.logps import response_logps
from xpo_jax.embedded.german import corpus
from xpo_jax.embedded.german.grammar import is_held_out, random_meaning, realise
from xpo_jax.judges.paraphrase_gates import letters, similarity
from xpo_jax.models.decoder import Decoder
from xpo_jax.models.hf import model_folder

FOLDER = Path(__file__).parents[2] / "xpo_jax" / "embedded"
SEED = 7


def build_prompts() -> None:
    """Write the training and held-out prompts."""
    folder = FOLDER / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(
        ("train", "held_out"), corpus.prompts(SEED, train=4000, held_out=1000), strict=True
    ):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def encode_pair(tokenizer: Any, source: str, target: str) -> tuple[list[int], list[int]]:
    """Return prompt and response ids, as a run will see them."""
    user = [{"role": "user", "content": f"<pphr_input>{source}</pphr_input>"}]
    prompt = tokenizer.apply_chat_template(user, add_generation_prompt=True, tokenize=False)
    response = f"<pphr_output>{target}</pphr_output><|im_end|>"
    return tokenizer(prompt)["input_ids"], tokenizer(response)["input_ids"]


def two_styles(rng: random.Random) -> tuple[str, str]:
    """Draw a source and a target: in three of four cases the nearest to it of 16 paraphrases, else the farthest of 8.

    Distance is measured on all letters and on the first 20, as the judge does.
    """
    meaning = random_meaning(rng)
    while is_held_out(meaning):
        meaning = random_meaning(rng)
    source = realise(meaning, rng)
    near = rng.random() < 0.75
    drawn = (realise(meaning, rng) for _ in range(16 if near else 8))
    targets = [target for target in drawn if target != source]
    if not targets:
        return two_styles(rng)
    source_letters, start = letters(source), letters(source)[:20]

    def nearness(target: str) -> float:
        return similarity(source_letters, letters(target)) + similarity(start, letters(target)[:20])

    return source, (max if near else min)(targets, key=nearness)


def batches(
    draw: Callable[[random.Random], tuple[str, str]], tokenizer: Any, pool: int, batch_size: int, steps: int
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield the batches from number pool * 8, in pools of 8 sorted by length, for little padding and few shapes."""
    pad = tokenizer.pad_token_id

    def array(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.array([len(r) for r in rows], np.int32)
        padded = -(-int(lengths.max()) // 8) * 8
        return np.array([r + [pad] * (padded - len(r)) for r in rows], np.int32), lengths

    def make(pool: int) -> list[tuple[np.ndarray, ...]]:
        rng = random.Random(f"{SEED} {pool}")
        pairs = [encode_pair(tokenizer, *draw(rng)) for _ in range(8 * batch_size)]
        pairs.sort(key=lambda pair: (len(pair[1]), len(pair[0])))
        pool_batches = []
        for i in range(0, len(pairs), batch_size):
            chunk = pairs[i : i + batch_size]
            pool_batches.append((*array([p for p, _ in chunk]), *array([r for _, r in chunk])))
        rng.shuffle(pool_batches)
        return pool_batches

    with ThreadPoolExecutor(1) as thread:
        prefetched = thread.submit(make, pool)
        while pool * 8 < steps:
            ready, pool = prefetched.result(), pool + 1
            prefetched = thread.submit(make, pool)
            yield from ready


def fine_tune(
    draw: Callable[[random.Random], tuple[str, str]],
    params: Any,
    saved: Path,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> Any:
    """Train `params` on the pairs that `draw` returns; save the state to `saved`, and resume from it if it exists."""
    tokenizer = model_folder.load_tokenizer(FOLDER / "model", SHAPE)
    graphdef = nnx.split(nnx.eval_shape(lambda: Decoder(SHAPE, rngs=nnx.Rngs(0), stacked=True)))[0]
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.01))
    opt_state = optimizer.init(params)

    @jax.jit
    def train_step(params: Any, opt_state: Any, batch: Any) -> Any:
        def loss_fn(params: Any) -> jax.Array:
            prompt, prompt_lengths, response, lengths = batch
            scored = response_logps(
                graphdef,
                params,
                prompt,
                prompt_lengths,
                response[None],
                lengths[None],
                temperature=1.0,
                vocab_size=VOCABULARY,
                chunk_tokens=4096,
            )
            return -scored.logps.sum() / lengths.sum()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    step = 0
    leaves, tree = jax.tree.flatten((params, opt_state))
    if saved.exists():
        with np.load(saved) as data:
            step = int(data["step"])
            params, opt_state = tree.unflatten([data[str(i)] for i in range(len(leaves))])
        print(f"resuming at step {step}")
    begun, first, losses = time.monotonic(), step, []
    for batch in batches(draw, tokenizer, step // 8, batch_size, steps):
        params, opt_state, loss = train_step(params, opt_state, batch)
        losses.append(loss)
        step += 1
        if step % 40 == 0:
            rest = (time.monotonic() - begun) / (step - first) * (steps - step)
            mean = float(np.mean(jax.device_get(losses)))
            print(f"step {step}/{steps}  loss {mean:.4f} nats/token  {rest / 60:.0f} min left", flush=True)
            losses = []
        if step % 400 == 0 or step == steps:
            temporary = saved.with_suffix(".part.npz")
            arrays = {
                str(i): leaf for i, leaf in enumerate(jax.device_get(jax.tree.leaves((params, opt_state))))
            }
            np.savez(temporary, step=step, **arrays)
            temporary.replace(saved)
    return params


def build_model(folder: Path, work: Path, *, steps: int, batch_size: int, learning_rate: float) -> None:
    """Run both phases of the fine-tuning and write the weights into `folder`."""
    _, state = nnx.split(Decoder(SHAPE, rngs=nnx.Rngs(SEED), stacked=True))
    params = jax.tree.map(lambda p: p * 0.02 / jnp.std(p) if jnp.std(p) > 0 else p, nnx.to_pure_dict(state))
    params = fine_tune(
        corpus.sft_pair,
        params,
        work / "meanings.npz",
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
    )
    params = fine_tune(
        two_styles,
        params,
        work / "manners.npz",
        steps=steps // 2,
        batch_size=batch_size,
        learning_rate=learning_rate / 2,
    )
    shutil.rmtree(work / "model", ignore_errors=True)
    model_folder.save(work / "model", jax.device_get(params), SHAPE, folder)
    (work / "model" / "model.safetensors").replace(folder / "model.safetensors")


def main() -> None:
    """Build what --stage names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=("all", "prompts", "tokenizer", "model"), default="all")
    parser.add_argument(
        "--work", type=Path, default=Path("build/embedded"), help="where training state is saved"
    )
    parser.add_argument(
        "--steps", type=int, default=4000, help="updates of the first phase; the second has half as many"
    )
    parser.add_argument("--batch_size", type=int, default=128, help="pairs per update")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="its peak")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    folder = FOLDER / "model"
    if args.stage in ("all", "prompts"):
        build_prompts()
    if args.stage in ("all", "tokenizer"):
        build_tokenizer(folder, SEED)
    if args.stage in ("all", "model"):
        build_model(
            folder, args.work, steps=args.steps, batch_size=args.batch_size, learning_rate=args.learning_rate
        )
    if args.stage in ("all", "model"):
        write_card(FOLDER)


if __name__ == "__main__":
    main()
