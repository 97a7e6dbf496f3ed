"""A whole run that takes seconds: its prompts, its config, its command line, what it leaves, and how it is killed."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import pytest
from fake_models import write_model
from ml_collections import ConfigDict

from xpo_jax.algorithm import packing
from xpo_jax.algorithm.programs import Programs
from xpo_jax.config.loader import ConfigError
from xpo_jax.runtime import sharding


def write_rows(path: Path, rows: list[Any]) -> str:
    """Write rows as JSON Lines; return the path as a config holds it."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


TRAIN_ROWS, HELD_OUT_ROWS = 21, 11  # the last batch of eight is partial in both


def write_prompts(folder: Path) -> None:
    """Write train.jsonl and held_out.jsonl; two training prompts and one held-out prompt need the second bucket."""
    texts = [
        f"{i:02d}" + "x" * (19 if i in (4, 13, 25) else i * 5 % 11) for i in range(TRAIN_ROWS + HELD_OUT_ROWS)
    ]
    rows = [{"text": text, "number": i} for i, text in enumerate(texts)]
    write_rows(folder / "train.jsonl", rows[:TRAIN_ROWS])
    write_rows(folder / "held_out.jsonl", rows[TRAIN_ROWS:])


ADAMW = {
    "name": "adamw",
    "learning_rate": 1e-2,
    "schedule": "constant",
    "warmup_steps": 0,
    "b1": 0.9,
    "b2": 0.99,
    "eps": 1e-8,
    "mu_dtype": "float32",
    "weight_decay": 0.0,
    "clip_norm": 1.0,
}  # the arguments of make_optimizer except the steps
ADAFACTOR = {**ADAMW, "name": "adafactor", "b1": None, "b2": None, "eps": None, "mu_dtype": None}


def tiny_config(folder: Path) -> ConfigDict:
    """Return a complete config of a run that takes seconds, and write its model and prompts into `folder`.

    Its run_dir is `folder / "run"`.
    """
    if not (folder / "model").exists():
        write_model(folder / "model")
        write_prompts(folder)
    return ConfigDict(
        {
            "run_dir": str(folder / "run"),
            "seed": 3,
            "steps": 4,
            "batch_size": 8,
            "max_skipped": 2,
            "max_step_seconds": 300.0,
            "data": {
                "train": str(folder / "train.jsonl"),
                "held_out": str(folder / "held_out.jsonl"),
                "select": None,
                "rename": None,
                "template": ({"role": "user", "content": "{text}"},),
                "column": None,
                "filter_tokens": None,
                "filter_length": False,
                "max_prompt_tokens": 40,
                "buckets": (32, 40),
                "on_long": "error",
                "on_bad_row": "error",
                "on_extra_keys": "error",
                "on_assistant_last": "error",
                "deduplicate": False,
                "take": None,
                "shuffle": True,
                "chat_template_arguments": None,
            },
            "offline": None,
            "model": {
                "path": str(folder / "model"),
                "reference": None,
                "reference_every_steps": None,
                "dtype": "float32",
                "attention": "auto",
            },
            "lora": {
                "rank": 0,
                "alpha": 8.0,
                "targets": ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
                "rslora": False,
                "start": None,
            },
            "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
            "distributed": {
                "mode": "auto",
                "coordinator": None,
                "num_processes": None,
                "process_id": None,
                "timeout_seconds": 60,
            },
            "sampling": {
                "max_new_tokens": 8,
                "temperature": 0.9,
                "top_k": 0,
                "top_p": 1.0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "end_tokens": None,
                "second_temperature": None,
            },
            "judge": {"name": "fakes:LongerText"},
            "judging": {
                "both_orders": False,
                "hide_thinking": False,
                "steps_behind": 0,
                "max_queries": None,
                "max_failed_fraction": 0.5,
                "max_failed_batches": 2,
                "max_indecisive_steps": None,
            },
            "loss": {
                "second_candidate": "reference",
                "candidates": 1,
                "pairing": None,
                "name": "sigmoid",
                "beta": 0.1,
                "alpha": 1e-3,
                "bonus_clip": 500.0,
                "bonus": "linear",
                "bonus_sample": "second",
                "flip_rate": 0.0,
                "entropy_weight": 0.0,
                "unfinished_loses": False,
            },
            "replay": {"updates": 1, "capacity": 1000},
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-2,
                "schedule": "linear",
                "warmup_steps": 1,
                "b1": 0.9,
                "b2": 0.99,
                "eps": 1e-4,  # large, so that rounding does not become a full step where a gradient is near zero
                "mu_dtype": "float32",
                "weight_decay": 0.0,
                "clip_norm": 1.0,
            },
            "layout": {
                "micro_batch_rows": 2,
                "chunk_tokens": 1024,
                "remat": False,
                "prefill_rows": None,
                "reference_steps": 1,
            },
            "evaluation": {
                "prompts": HELD_OUT_ROWS,
                "judge": None,
                "reference_samples": 2,
                "every_steps": 0,
                "answers": None,
                "stop_kl": None,
                "stop_win_rate": None,
                "stop_validity_drop": None,
            },
            "checkpoint": {"every_steps": None, "keep_last": 2, "keep_every": None, "export": "last"},
            "logging": {"table_every_steps": 1, "tensorboard": False, "wandb": False, "profile": False},
        }
    )


def config_error(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Return the one line of the ConfigError that a call raises."""
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def run_main(argv: Sequence[str]) -> tuple[int, str, str]:
    """Return exit status, standard output and standard error of the command line, run in this process."""
    from xpo_jax.main import main

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(argv)
    return status, out.getvalue(), err.getvalue()


def write_config(path: Path, config: ConfigDict) -> str:
    """Write a config as a Python file with get_config; return the path as the command line takes it."""
    path.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config(arg=None):\n    return ConfigDict({config.to_dict()!r})\n",
        encoding="utf-8",
    )
    return str(path)


def changed_config(folder: Path, **changes: Any) -> ConfigDict:
    """Return the tiny config with changed fields, a group and its field joined by "__": loss__alpha=0.0."""
    config = tiny_config(folder)
    for path, value in changes.items():
        group, _, field = path.rpartition("__")
        (config[group] if group else config)[field] = value
    return config


def run_name(folder: Path, name: str, config: ConfigDict, flags: Sequence[str] = ()) -> tuple[int, str, str]:
    """Run a config in the run directory `folder / name`; return what `run_main` returns."""
    config.run_dir = str(folder / name)
    return run_main([f"--config={write_config(folder / f'{name}.py', config)}", *flags])


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl without timings."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timing = lambda name: name.startswith("time/") or name == "tokens_per_second"
    return [{name: value for name, value in row.items() if not timing(name)} for row in rows]


def run_contents(run_dir: Path) -> dict[str, Any]:
    """Return everything that a finished run leaves except timings and its own name."""
    result = json.loads((run_dir / "result.json").read_text())
    for name in ("seconds", "run_dir", "export", "compilations_during_run"):
        del result[name]
    return {
        "metrics": read_metrics(run_dir),
        "result": result,
        "pairs": (run_dir / "pairs.jsonl").read_text(),
        "samples": (run_dir / "samples" / "held_out.md").read_text(),
        "weights": (run_dir / "export" / "model.safetensors").read_bytes(),
        "evaluations": {file.name: file.read_text() for file in (run_dir / "evaluations").iterdir()},
    }


class Killed(BaseException):
    """Ends a run as a kill does: nothing catches it."""


@contextlib.contextmanager
def killed_at_update(number: int) -> Iterator[None]:
    """Expect the run within to be killed before its update of this number, from 0 on."""
    update, numbers = Programs.update, itertools.count()

    def update_or_die(self: Programs, *args: Any) -> Any:
        if next(numbers) == number:
            raise Killed
        return update(self, *args)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Programs, "update", update_or_die)
        yield


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """Put runs with the mesh of `tiny_config` on one device; another mesh stays what it is."""
    make_mesh = sharding.make_mesh

    def make_small_mesh(*, data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
        if (data, fsdp, tensor) != (2, 2, 2):
            return make_mesh(data=data, fsdp=fsdp, tensor=tensor)
        auto = (jax.sharding.AxisType.Auto,) * 3
        return jax.make_mesh((1, 1, 1), sharding.AXES, axis_types=auto, devices=jax.devices()[:1])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sharding, "make_mesh", make_small_mesh)
        yield


@contextlib.contextmanager
def one_sequence_length() -> Iterator[None]:
    """Let runs compile only the longest of the sequence lengths that pairs are packed into."""
    sequence_lengths = packing.sequence_lengths
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packing, "sequence_lengths", lambda *args: sequence_lengths(*args)[-1:])
        yield


if __name__ == "__main__":  # the command line in a process of its own, with one sequence length
    from xpo_jax.main import main

    with one_sequence_length():
        sys.exit(main(sys.argv[1:]))
