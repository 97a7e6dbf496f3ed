"""Measure what bfloat16 costs a gradient: every tensor's against float32's, and torch's autocast as a yardstick.

    python -m pip install torch transformers
    python -m tools.rounding --model=FOLDER --text=FILE [--prompt_tokens=128] [--response_tokens=384] [--rows=2]

The gradient is that of the log-probability of a response, averaged over rows; prompts and responses follow each other
in the tokens of FILE. It is computed from the same float32 weights by the pass that the update runs, in float32 and in
bfloat16 (weights cast, gradients of float32 weights), and by transformers in float32 and under
torch.autocast(bfloat16). It prints, for each kind of tensor, the relative error |g - g32| / |g32| and the cosine with
g32, the median and the worst of all layers; g32 is ours. In float32 the two programs should differ by far less than
bfloat16 does.

On a CPU, XLA computes bfloat16 by rounding what it computed in float32; a TPU and a GPU do so at other places. Without
torch, only our own figures are printed.

Exit status: 0 done, 2 invalid input (one line explains), 130 interrupted.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from tools.cli import Parser, exit_status, path_argument
from xpo_jax.algorithm.logps import response_logps
from xpo_jax.models import registry
from xpo_jax.models.hf import model_folder, weights
from xpo_jax.models.layers import narrow
from xpo_jax.reporting.console import text_table
from xpo_jax.values import Params

Gradients = dict[str, np.ndarray]  # by the names of the checkpoint


class Batch(NamedTuple):
    """Prompts i32[B P] and their responses i32[B T]."""

    prompts: np.ndarray
    responses: np.ndarray


def batch_of(tokens: Sequence[int], rows: int, prompt_tokens: int, response_tokens: int) -> Batch:
    """Cut consecutive rows from a text's tokens.

    Raises:
      ValueError: the text is too short.
    """
    width = prompt_tokens + response_tokens
    if len(tokens) < rows * width:
        raise ValueError(
            f"--text: it has {len(tokens)} tokens, and {rows} x {width} are needed; give a longer one"
        )
    cut = np.asarray(tokens[: rows * width], np.int32).reshape(rows, width)
    return Batch(cut[:, :prompt_tokens], cut[:, prompt_tokens:])


def objective(config: Any, batch: Batch, dtype: Any) -> Callable[[Params], jax.Array]:
    """Return the function of float32 weights whose gradient is compared; it computes in `dtype`, as the update does."""
    graphdef, _ = registry.abstract_model(config, stacked=True, remat=True)
    (rows, prompt_tokens), response_tokens = batch.prompts.shape, batch.responses.shape[1]

    def logps(params: Params) -> jax.Array:
        scored = response_logps(
            graphdef,
            jax.tree.map(lambda p: narrow(p, jnp.dtype(dtype)), params),
            jnp.asarray(batch.prompts),
            jnp.full(rows, prompt_tokens),
            jnp.asarray(batch.responses)[None],
            jnp.full((1, rows), response_tokens),
            temperature=1.0,
            vocab_size=config.vocab_size,
            chunk_tokens=128,
            entropy_gradient=False,
        )
        return scored.logps.mean()

    return logps


def ours(folder: Path, batch: Batch, dtype: Any) -> Gradients:
    """Return the gradients of `objective`."""
    config = model_folder.read_config(folder)
    gradients = jax.jit(jax.grad(objective(config, batch, dtype)))(weights.load_params(folder, config))
    with tempfile.TemporaryDirectory() as written:  # in the checkpoint's names and layout
        weights.write_params(Path(written), gradients, config, dtype="float32", max_shard_bytes=2**40)
        return load_file(Path(written) / "model.safetensors")


def has_torch() -> bool:
    """Return whether torch is installed."""
    return importlib.util.find_spec("torch") is not None


def by_torch(folder: Path, batch: Batch, *, autocast: bool) -> Gradients:
    """Return the gradients of the same function by transformers in float32, under autocast(bfloat16) or not."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokens = torch.tensor(np.concatenate([batch.prompts, batch.responses], axis=1), dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(input_ids=tokens).logits
    first = batch.prompts.shape[1]
    logps = torch.log_softmax(logits[:, first - 1 : -1].float(), -1)
    logps.gather(-1, tokens[:, first:, None]).sum((1, 2)).mean().backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters()}


class Distance(NamedTuple):
    """The relative error of one tensor, and its cosine with the exact one."""

    error: float
    cosine: float


def distance(gradient: np.ndarray, exact: np.ndarray) -> Distance | None:
    """Return how far a gradient is from the exact one, computed in float64; None if that is zero."""
    g, x = gradient.astype(np.float64).ravel(), exact.astype(np.float64).ravel()
    norm = float(np.linalg.norm(x))
    if norm == 0:
        return None
    return Distance(float(np.linalg.norm(g - x)) / norm, float(g @ x / (np.linalg.norm(g) * norm)))


def table(exact: Gradients, columns: Mapping[str, Gradients]) -> str:
    """Return the table of errors and cosines by kind of tensor, over the layers."""
    kinds: dict[str, list[str]] = {}
    for name in exact:
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name).removeprefix("model."), []).append(name)
    rows: list[list[Any]] = []
    for kind, names in kinds.items():
        row: list[Any] = [kind]
        for gradients in columns.values():
            distances = [d for name in names if (d := distance(gradients[name], exact[name])) is not None]
            errors, cosines = [d.error for d in distances], [d.cosine for d in distances]
            row += (
                [f"{np.median(errors):.2g} / {max(errors):.2g}", f"{min(cosines):.6f}"]
                if distances
                else ["0", "-"]
            )
        rows.append(row)
    head = ["median / worst error, least cosine"]
    for column in columns:
        head += [column, "cosine"]
    return text_table(head, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print; return the exit status."""
    return exit_status("rounding", lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m tools.rounding", description=__doc__)
    parser.add_argument("--model", required=True, type=path_argument, help="folder of a Hugging Face model")
    parser.add_argument("--text", required=True, type=path_argument, help="file whose tokens are the rows")
    for name, default in (("rows", 2), ("prompt_tokens", 128), ("response_tokens", 384)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(argv)
    sizes = (options.rows, options.prompt_tokens, options.response_tokens)
    if min(sizes) < 1:
        raise ValueError("--rows, --prompt_tokens, --response_tokens: must be at least 1")
    folder: Path = options.model
    tokenizer = model_folder.load_tokenizer(folder, model_folder.read_config(folder))
    batch = batch_of(tokenizer.encode(options.text.read_text()), *sizes)
    exact = ours(folder, batch, jnp.float32)
    columns = {"bfloat16": ours(folder, batch, jnp.bfloat16)}
    if not has_torch():
        print("torch is not installed: without its figures", file=sys.stderr)
    else:
        columns["torch autocast"] = by_torch(folder, batch, autocast=True)
        columns["torch float32"] = by_torch(folder, batch, autocast=False)
    print(table(exact, columns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
