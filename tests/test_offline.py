"""Training on pairs that were judged before: the same update, the same bits, and no judge queries in training."""

import json
import shutil

import numpy as np
import pytest
from fakes import Recording
from tiny_run import changed_config, killed_at_update, run_main, run_name

from xpo_jax.algorithm.programs import Programs
from xpo_jax.data.pairs_log import read_pairs

pytestmark = pytest.mark.usefixtures("one_device")
STEPS = 4  # of eight pairs: 8 + 8 + 5 in an epoch of the 21 prompts, then 8 of the next


@pytest.fixture(scope="module")
def run(folder):
    def start(name, *flags, pairs=None, **changes):
        if pairs is not None:
            changes["offline"] = {"pairs": pairs}
        changes = {"judge__name": "fakes:Patchy", "judging__max_failed_fraction": 1.0, **changes}
        Recording.calls = []
        return run_name(folder, name, changed_config(folder, **changes), flags)

    return start


@pytest.fixture(scope="module")
def online(run, folder):
    """Return the folder of a run of four steps whose judge always has a verdict."""
    status, _, err = run("online", judge__name="fakes:Recording")
    assert status == 0, err
    return folder / "online"


def metrics(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_offline_first_step_equals_the_online_step_that_recorded_it(run, folder, online):
    changes = {"data__shuffle": False, "data__train": "is not read", "judge__name": "fakes:Recording"}
    status, out, err = run("offline", pairs=str(online / "pairs.jsonl"), **changes)
    assert status == 0, err
    assert "29 prompts of" in out and "each with two responses and their verdict" in " ".join(out.split())
    online_row, offline_row = metrics(online)[1], metrics(folder / "offline")[1]
    left_out = {"objective/kl", "objective/kl_per_token", "objective/entropy"}
    names = [n for n in online_row if n.split("/")[0] in ("loss", "rewards", "logps")] + [
        "grad_norm",
        "learning_rate",
    ]
    assert len(names) > 12
    assert {n: offline_row[n] for n in names} == pytest.approx(
        {n: online_row[n] for n in names}, rel=1e-6, abs=1e-6
    )
    assert online_row["loss/xpo"] != 0 and not left_out & set(offline_row)
    assert metrics(online)[0]["eval/win_rate"] == metrics(folder / "offline")[0]["eval/win_rate"]
    result = json.loads((folder / "offline" / "result.json").read_text())
    assert result["judge_queries"] == 0 and result["evaluation_queries"] > 0 and result["steps"] == STEPS
    assert (folder / "offline" / "report.html").exists() and not list(
        read_pairs(folder / "offline" / "pairs.jsonl")
    )
    assert "judged before" in (folder / "offline" / "export" / "README.md").read_text()


def test_offline_epoch_has_every_judged_pair_once(run, folder, monkeypatch):
    """Each epoch has its own order; pairs without a verdict are counted and left out."""
    status, _, err = run("patchy")
    assert status == 0, err
    records = list(read_pairs(folder / "patchy" / "pairs.jsonl"))
    judged = [record for record in records if record["weight"]]
    failed = len(records) - len(judged)
    assert failed > 0
    seen, update = [], Programs.update

    def spy(self, state, frozen, pairs, packed, alpha, beta):
        for i in np.flatnonzero(pairs.valid):
            tokens = [pairs.tokens[c, i, : pairs.lengths[c, i]].tolist() for c in (0, 1)]
            prompt = pairs.prompt_tokens[i, : pairs.prompt_lengths[i]].tolist()
            seen.append((prompt, tokens, float(pairs.p_first[i]), float(pairs.weight[i])))
        return update(self, state, frozen, pairs, packed, alpha, beta)

    monkeypatch.setattr(Programs, "update", spy)
    steps = 2 * -(-len(judged) // 8)
    status, out, err = run("epochs", pairs=[str(folder / "patchy" / "pairs*.jsonl")], steps=steps)
    assert status == 0, err
    assert f"from {len(records)} rows; left out: no verdict {failed};" in " ".join(out.split())
    epochs = seen[: len(judged)], seen[len(judged) :]
    answers = [[response["tokens"] for response in record["responses"]] for record in judged]
    expected = sorted(zip(answers, [r["p_first"] for r in judged], strict=True))
    assert [sorted((a, p) for _, a, p, _ in epoch) for epoch in epochs] == [expected, expected]
    assert epochs[0] != epochs[1] and [a for _, a, _, _ in epochs[0]] != answers
    assert {weight for *_, weight in seen} == {1.0}
    # the byte tokenizer and the chat template by hand
    text = {
        json.dumps(a): record["messages"][-1]["content"] for a, record in zip(answers, judged, strict=True)
    }
    for prompt, tokens, _, _ in seen[:8]:
        content = text[json.dumps(tokens)]
        words = [*f"user\n{content}".encode()], [*b"assistant\n"]
        letters = [[LETTER[byte] for byte in part] for part in words]
        assert prompt == [257, *letters[0], 258, LETTER[10], 257, *letters[1]]


def byte_letters():
    """Return the token of each byte: the position of its character in the sorted alphabet of byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letter = {byte: byte for byte in printable} | {byte: 256 + n for n, byte in enumerate(others)}
    order = sorted(letter.values())
    return {byte: order.index(code) for byte, code in letter.items()}


LETTER = byte_letters()


def test_offline_run_resumed_gives_the_same_weights(run, folder, online):
    given = {"pairs": str(online / "pairs.jsonl"), "checkpoint__every_steps": 2}
    assert run("uninterrupted", **given)[0] == 0
    with killed_at_update(3):
        run("interrupted", **given)
    status, out, err = run("interrupted", **given)
    assert status == 0 and "after step 2, whose checkpoint is complete" in out, err
    weights = [folder / name / "export" / "model.safetensors" for name in ("uninterrupted", "interrupted")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_run_repeated_from_its_saved_config_gives_the_same_pairs(online, folder):
    again = f"--config.run_dir={folder / 'again'}"
    status, _, err = run_main([f"--config={online / 'config.json'}", again])
    assert status == 0, err
    assert (folder / "again" / "pairs.jsonl").read_bytes() == (online / "pairs.jsonl").read_bytes()


def edit(source, target, change):
    """Write a copy of a log with its first record changed; return its path."""
    lines = source.read_text().splitlines(keepends=True)
    record = json.loads(lines[0])
    change(record["responses"][0])
    target.write_text(json.dumps(record) + "\n" + "".join(lines[1:]))
    return str(target)


def test_offline_pairs_that_do_not_fit_are_refused_in_one_line(run, folder, online):
    log = online / "pairs.jsonl"

    def error_of(pairs, **changes):
        status, _, err = run("refused", pairs=pairs, **changes)
        assert status == 2 and len(err.splitlines()) == 1, err
        assert not (folder / "refused").exists()
        return err

    assert "offline.pairs: no file matches" in error_of(str(folder / "none*.jsonl"))
    assert "none.jsonl: cannot be read" in error_of(str(folder / "none.jsonl"))
    assert "offline.pairs: name at least one" in error_of(())
    (folder / "empty.jsonl").touch()
    assert "empty.jsonl: no pair is left of 0 (they are empty)" in error_of(str(folder / "empty.jsonl"))
    beyond = edit(log, folder / "beyond.jsonl", lambda r: r["tokens"].insert(0, 259))
    assert (
        "beyond.jsonl, row 1: a response has no tokens, or token ids beyond the tokenizer's 259"
        in error_of(beyond)
    )
    ends = edit(log, folder / "ends.jsonl", lambda r: r.update(finished=not r["finished"]))
    assert "ends.jsonl, row 1: a response does not end where" in error_of(ends)
    other = edit(log, folder / "other.jsonl", lambda r: r["tokens"].insert(0, 70))
    assert "other.jsonl, row 1: a response has token ids that do not decode" in error_of(other)
    short = {"sampling__max_new_tokens": 7}
    assert "tokens, more than sampling.max_new_tokens = 7" in error_of(str(log), **short)
    error = error_of(str(log), data__max_prompt_tokens=30, data__held_out=str(folder / "train.jsonl"))
    assert "max_prompt_tokens = 30" in error
    shutil.rmtree(folder / "refused", ignore_errors=True)
