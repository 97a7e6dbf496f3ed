"""The README.md of an export: what the model came from, how it was trained, and what was measured.

It may be published as it is, so it holds nothing of the machine: groups of the config that name files, and a
judge's arguments, which may hold addresses and keys, are left out on purpose.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from xpo_jax.config.settings import Experiment
from xpo_jax.io.files import to_json
from xpo_jax.models.hf.hub import Model

SHOWN = ("steps", "batch_size", "seed", "loss", "optimizer", "sampling")


def card(top: Experiment, policy: Model, reference: Model, found: Mapping[str, Any], *, held_out: int) -> str:
    """The text of the card.

    Args:
      top: the config.
      policy, reference: what training started from, and what it was held against.
      found: the last evaluation, as `summary.result_fields` tells it.
      held_out: prompts of that evaluation.
    """
    base, commit = policy.name, f" (commit {policy.commit})" if policy.commit else ""
    against = "a frozen copy of it" if reference == policy else _code(reference.name)
    settings = {name: getattr(top, name) for name in SHOWN}
    judge = _code(top.judge["name"])
    method, how = (
        ("XPO", f"its answers were compared with those of the reference, {against}, by the judge {judge}.")
        if top.offline is None
        else (
            "offline preference optimization",
            f"on pairs of answers that had been judged before; the reference was {against}, the judge of the"
            f" figures below {judge}.",
        )
    )
    return f"""---
base_model: {json.dumps(base, ensure_ascii=False)}
library_name: transformers
pipeline_tag: text-generation
---

# {base.rpartition("/")[2]}, after {top.steps} steps of {method}

{_code(base)}{commit}, trained with the loss of
[Exploratory Preference Optimization](https://arxiv.org/abs/2405.21046) by xpo_jax: {how}

## Measured

At the end of training, on {held_out} held-out prompts. The interval is one of 95 %, over the prompts of this one run.

| | reference | this model |
|---|---|---|
{_rows(found)}
## Settings

```json
{to_json(settings, indent=2)}
```
"""


def _rows(found: Mapping[str, Any]) -> str:
    share = lambda value: f"{value:.1%}"  # noqa: E731
    won = "no verdicts"
    if found["win_rate"] is not None:
        low, high = share(found["win_rate_low"]), share(found["win_rate_high"])
        won = f"{share(found['win_rate'])} [{low}, {high}]"
    rows = [
        ("win rate against the reference", "50.0%", won),
        ("KL to the reference, nats per answer", "0", f"{found['kl']:.3g}"),
    ]
    for name, key in (("valid answers", "valid"), ("copies of the input", "copy_rate")):
        if found[key] is not None:  # not every judge tells
            rows.append((name, share(found[f"{key}_reference"]), share(found[key])))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _code(text: str) -> str:
    return f"`{text.replace('`', '')}`"
