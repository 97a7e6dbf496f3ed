"""Which config fields and inputs may change when a run resumes, and how a change is reported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# None of these changes what a step learns, except through rounding on another mesh or in another layout. `steps` does
# where the learning rate decays over all of them, which is what somebody who raises it expects.
MAY_CHANGE = (
    "steps",
    "max_skipped",
    "max_step_seconds",
    "evaluation.",
    "logging.",
    "checkpoint.",
    "mesh.",
    "layout.",
    "judging.max_",
    "judge.port",  # of a page, which decides nothing
)
_NEVER_COMPARED = ("run_dir", "distributed.")
_OPEN = ("judge.", "evaluation.judge.", "loss.", "optimizer.")


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Return, by name, a line on each field that differs between the run's last config and the present one.

    A field that one of them lacks is equal to None, so that a new field, if it is off, keeps no older run from
    resuming; except in groups that are arguments of the user's code, where an absent one may be something else.
    """
    old, new = _flat(before), _flat(now)

    def differs(name: str) -> bool:
        absent = None if name.startswith(_OPEN) else "null"
        return old.get(name, absent) != new.get(name, absent)

    return {
        name: f"{name}: {old.get(name, 'absent')} there, {new.get(name, 'absent')} here"
        for name in {**old, **new}
        if differs(name) and not name.startswith(_NEVER_COMPARED)
    }


def compare_inputs(
    before: Mapping[str, str], now: Mapping[str, str], changed_fields: Mapping[str, str]
) -> dict[str, str]:
    """Return, by name, a line on each input whose content differs although its field names the same.

    Args:
      before, now: fingerprints by field, see inputs.py.
      changed_fields: as `compare` returns them.
    """
    return {
        f"{name} (content)": f"{name}: its content is another one, fingerprint {before[name][:12]} there,"
        f" {now[name][:12]} here"
        for name in before
        if name in now
        and before[name] != now[name]
        and not any(field.startswith(name) for field in changed_fields)
    }


def refused(changes: Mapping[str, str], *, finished: bool, accept: bool) -> tuple[str, str] | None:
    """Return what the run is of instead, with the differences, and a further remedy; None if it may resume.

    Args:
      changes: as `compare` returns them.
      finished: whether the run is; then it resumes only with other `steps`.
      accept: fields that may not change.
    """
    closed = finished and "steps" not in changes
    lines = [line for name, line in changes.items() if closed or not name.startswith(MAY_CHANGE)]
    if not lines or (accept and not closed):
        return None
    more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
    remedy = "" if closed else ", or add --accept-changes to resume with this config"
    kind = "other inputs" if all("its content is" in line for line in lines) else "another config"
    return f"{kind} ({'; '.join(lines[:3])}{more})", remedy


def fingerprint(config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Return the SHA-256 of the fields and inputs that may not change."""
    fields = {**_flat(config), **{f"{name} (content)": value for name, value in inputs.items()}}
    fixed = {k: v for k, v in fields.items() if not k.startswith((*MAY_CHANGE, *_NEVER_COMPARED))}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.dumps(value, ensure_ascii=False)
    return flat
