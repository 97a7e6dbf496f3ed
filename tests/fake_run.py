"""The files of a finished run, written by hand."""

import json


def evaluation(rate, half, *, kl=0.0, even=None, valid=0.9, tokens=10.0):
    """Return the metrics of an evaluation with a win rate of `rate` +- `half`."""
    even = rate if even is None else even
    return {
        "eval/win_rate": rate,
        "eval/win_rate_low": rate - half,
        "eval/win_rate_high": rate + half,
        "eval/win_rate_controlled": even,
        "eval/win_rate_controlled_low": even - half,
        "eval/win_rate_controlled_high": even + half,
        "eval/kl": kl,
        "eval/entropy": 0.5,
        "eval/policy/valid": valid,
        "eval/reference/valid": 0.9,
        "eval/policy/tokens": tokens,
        "eval/reference/tokens": 10.0,
        "eval/policy/taste": 0.3,
        "eval/reference/taste": 0.2,
    }


def step(number, **more):
    """Return a row of metrics.jsonl."""
    names = ("loss/total", "loss/dpo", "loss/xpo", "judge/win_rate", "objective/kl", "time/update", "skipped")
    return {"step": number, **dict.fromkeys(names, 0.0), "judge/queries": 8 * number, **more}


def write_run(path, rows, *, hostile="a <b> & c", result=True, reference=None):
    """Write a run directory with these rows of metrics, and `hostile` in every text that a report shows."""
    path.mkdir(parents=True)
    config = {
        "steps": 2,
        "judge": {"name": "some:Judge"},
        "model": {"path": "some/model", "reference": reference},
        "loss": {"second_candidate": "reference", "beta": 0.1},
    }
    (path / "config.json").write_text(json.dumps(config))
    lines = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)
    (path / "metrics.jsonl").write_text(lines(rows))
    (path / "samples").mkdir()
    sample = {"prompt": hostile, "reference": "old", "policy": hostile, "win_share": 1.0}
    verdicts = [(0.9, "A"), (0.5, None), (0.25, "B"), (None, "A")]
    samples = [
        {
            **sample,
            "p_policy": p,
            "shown": shown,
            "reason": hostile,
            "scores": {"policy": {"taste": 0.5, "why": hostile}},
        }
        for p, shown in verdicts
    ]
    (path / "samples" / "held_out.jsonl").write_text(lines(samples))
    pair = {
        "messages": [{"role": "user", "content": hostile}],
        "responses": [{"text": hostile}, {"text": "other"}],
    }
    verdict = {"shown": [1, 0], "p_first": 1.0, "reason": hostile, "failure": None, "scores": {hostile: 1}}
    (path / "pairs.jsonl").write_text(
        lines([{"step": i, "position": 0, **pair, **verdict} for i in range(300)])
    )
    failed = {"shown": [0, 1], "p_first": None, "reason": "", "failure": hostile, "scores": {}}
    (path / "pairs-1.jsonl").write_text(lines([{"step": 299, "position": 1, **pair, **failed}]) + '{"torn": ')
    if result:
        (path / "result.json").write_text(json.dumps({"ended_by": "steps", "note": hostile}))
    return path


ROWS = [
    {"step": 0, **evaluation(0.5, 0.05)},
    step(1),
    step(2, **evaluation(0.7, 0.05, kl=1.5, valid=0.89)),
]
