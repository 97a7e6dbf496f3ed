"""The README.md of an export: the model's origin, how it was trained, and what was measured.

It may be published as it is, so it names nothing of the machine: groups of the config that name files, and a
judge's arguments, which may hold addresses and keys, are left out on purpose.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from xpo_jax.config.settings import Experiment
from xpo_jax.io.files import to_json
from xpo_jax.models.hf.hub import Model

SETTINGS = ("steps", "batch_size", "seed", "loss", "optimizer", "sampling")


def card(
    top: Experiment,
    policy: Model,
    reference: Model,
    result: Mapping[str, Any],
    *,
    held_out: int,
    step: int,
) -> str:
    """Return the text of the card.

    Args:
      top: the config.
      policy: the model that training started from.
      reference: the model that it was compared with.
      result: the evaluation of the exported policy, from `summary.result_fields`, and why it was chosen, from
        `Selection.result`. step: after which it is.
      held_out: the number of prompts in that evaluation.
    """
    base, commit = policy.name, f" (commit {policy.commit})" if policy.commit else ""
    against = "a frozen copy of it" if reference == policy else _code(reference.name)
    settings = {name: getattr(top, name) for name in SETTINGS}
    if arguments := top.data["chat_template_arguments"]:  # prompts must be rendered with them
        settings["chat_template_arguments"] = arguments
    if top.lora["rank"]:
        settings["lora"] = {name: value for name, value in top.lora.items() if name != "start"}
    judge, measured_by = _code(top.judge["name"]), _code((top.evaluation["judge"] or top.judge)["name"])
    method, how = (
        ("XPO", f"its answers were compared with those of the reference, {against}, by the judge {judge}.")
        if top.offline is None
        else (
            "offline preference optimization",
            f"on pairs of answers that had been judged before; the reference was {against}, the judge of the"
            f" figures below {measured_by}.",
        )
    )
    when = (
        "At the end of training,"
        if "exported_by" not in result
        else f"After step {step}, the best of its run,"
    )
    return f"""---
base_model: {json.dumps(base, ensure_ascii=False)}
library_name: transformers
pipeline_tag: text-generation
---

# {base.rpartition("/")[2]}, after {step} steps of {method}

{_code(base)}{commit}, trained with the loss of
[Exploratory Preference Optimization](https://arxiv.org/abs/2405.21046) by xpo_jax: {how}

## Measured

{when} on {held_out} held-out prompts, by the judge {measured_by}. The interval is one of 95 %, over
the prompts of this one run.

| | reference | this model |
|---|---|---|
{_rows(result)}
## Settings

```json
{to_json(settings, indent=2)}
```
"""


def _rows(result: Mapping[str, Any]) -> str:
    won = "no verdicts"
    if result["win_rate"] is not None:
        won = f"{result['win_rate']:.1%} [{result['win_rate_low']:.1%}, {result['win_rate_high']:.1%}]"
    rows = [
        ("win rate against the reference", "50.0%", won),
        ("KL to the reference, nats per sequence", "0", f"{result['kl']:.3g}"),
    ]
    for name, key in (("valid answers", "valid"), ("copies of the input", "copy_rate")):
        if result[key] is not None:  # not every judge reports it
            rows.append((name, f"{result[f'{key}_reference']:.1%}", f"{result[key]:.1%}"))
    if "exported_by" in result:
        ends = [result[f"exported_value{end}"] for end in ("", "_low", "_high")]
        rows.append((f"chosen by: {result['exported_by']}", "", "{:.4g} [{:.4g}, {:.4g}]".format(*ends)))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _code(text: str) -> str:
    return f"`{text.replace('`', '')}`"
