"""The pairs log: what is written is read, on disk before the update; damage is named."""

import hashlib
import json
import os

import numpy as np
import pytest
from test_files import files_of_at_most, strict

from xpo_jax.data import pairs_log
from xpo_jax.data.pairs_log import PairsLog, content_hash, pair_records, read_pairs
from xpo_jax.io.files import to_json
from xpo_jax.values import Prompts, Samples, Verdicts

MESSAGES = [{"role": "user", "content": "Sag „ja“!"}]


def batch():
    """Three rows: a verdict, a failure, and one that only fills up the batch."""
    prompts = Prompts(
        rows=({"id": 1, "score": np.float32(0.1)}, {"id": 2}, {}),
        messages=(MESSAGES, MESSAGES, []),
        tokens=np.zeros((3, 2), np.int32),
        lengths=np.array([2, 1, 1], np.int32),
        position=np.array([4, 5, 6], np.int32),
        valid=np.array([True, True, False]),
    )
    first = Samples(
        np.array([[5, 9, 0], [6, 7, 8], [1, 1, 1]], np.int32),
        np.array([2, 3, 1]),
        np.array([True, False, True]),
    )
    second = Samples(
        np.array([[4, 0, 0], [9, 0, 0], [1, 1, 1]], np.int32),
        np.array([1, 1, 1]),
        np.array([True, True, True]),
    )
    verdicts = Verdicts(
        p_first=np.array([0.7, 0.5, 0.5], np.float32),
        weight=np.array([1, 0, 0], np.float32),
        reasons=("kürzer", "timed out", ""),
        scores=({"policy": 0.7, "reference": float("nan")}, {}, {}),
        shown=((1, 0), None, None),
        flipped=np.full(3, np.nan, np.float32),
        queries=2,
        orders=1,
    )
    texts = (["ja", "ja ja", ""], ["Ja.\nJa!", "\ud83d", ""])
    ref_logps = np.array([[-1.1, -2, 0], [-0.3, -4, 0]], np.float32)
    return pair_records(3, prompts, (first, second), texts, verdicts, verdicts.shown, ref_logps)


FIRST = {
    "step": 3,
    "position": 4,
    "row": {"id": 1, "score": 0.1},
    "messages": MESSAGES,
    "responses": [
        {"tokens": [5, 9], "text": "ja", "finished": True},
        {"tokens": [4], "text": "Ja.\nJa!", "finished": True},
    ],
    "shown": [1, 0],
    "flipped": None,
    "p_first": 0.7,
    "ref_logps": [-1.1, -0.3],
    "weight": 1.0,
    "reason": "kürzer",
    "scores": {"policy": 0.7, "reference": None},
    "failure": None,
}


def test_content_hash_is_what_it_says():
    text = '[[{"content":"Sag \\u201eja\\u201c!","role":"user"}],{"id":1,"score":0.1},"ja","Ja.\\nJa!"]'
    digest = hashlib.sha256(text.encode("ascii")).hexdigest()
    row = {"score": np.float32(0.1), "id": 1}  # a float32 is written as 0.1
    assert content_hash(MESSAGES, row, "ja", "Ja.\nJa!") == digest
    assert content_hash([{"content": "Sag „ja“!", "role": "user"}], row, "ja", "Ja.\nJa!") == digest
    assert content_hash(MESSAGES, row, "Ja.\nJa!", "ja") != digest
    assert (
        content_hash(MESSAGES, {**row, "style": "brief"}, "ja", "Ja.\nJa!") != digest
    )  # a judge may ask for it
    assert content_hash([], {}, "ab", "c") != content_hash([], {}, "a", "bc")
    odd = {"x": float("nan"), "nested": {1: [np.int64(2)]}, "half": "\ud83d"}
    assert content_hash([], odd, "", "") == content_hash([], json.loads(to_json(odd)), "", "")


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "pairs.jsonl"
    log = PairsLog(path)
    assert log.offset == 0
    log.append(batch())
    assert log.offset == path.stat().st_size
    lines = path.read_text().splitlines()
    assert [strict(line)["position"] for line in lines] == [4, 5]
    assert strict(lines[0]) == FIRST | {"hash": content_hash(MESSAGES, FIRST["row"], "ja", "Ja.\nJa!")}
    failed = strict(lines[1])
    assert (failed["p_first"], failed["weight"], failed["failure"]) == (None, 0.0, "timed out")
    assert failed["responses"][0] == {"tokens": [6, 7, 8], "text": "ja ja", "finished": False}
    assert failed["responses"][1]["text"] == "\ud83d" and failed["shown"] is None
    log.append([])
    log.append(batch()[:1])
    log.close()
    warnings = []
    assert [pair["position"] for pair in read_pairs(path, warnings.append)] == [4, 5, 4]
    assert warnings == []


def test_a_record_is_on_disk_when_append_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(pairs_log.os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    with PairsLog(tmp_path / "pairs.jsonl") as log:
        log.append(batch())
    assert synced == [log.offset] and log.offset > 0


def test_a_torn_last_line(tmp_path, caplog):
    path = tmp_path / "pairs.jsonl"
    log = PairsLog(path)
    long = {"long": "x" * 100_000}
    log.append(
        [batch()[0] | {"row": long, "hash": content_hash(MESSAGES, long, "ja", "Ja.\nJa!")}, batch()[1]]
    )
    whole = log.offset
    log.close()
    with open(path, "ab") as file:
        file.write(b'{"step": 4, "row": "' + b"x" * 200_000)  # longer than one block of the search
    warnings = []
    assert len(list(read_pairs(path, warnings.append))) == 2
    assert warnings == [f"{path}, line 3: torn, 200020 bytes are ignored"]
    log = PairsLog(path)
    assert caplog.messages == [f"{path}: a torn last line of 200020 bytes is cut off"]
    assert log.offset == whole == path.stat().st_size
    log.append(batch())
    log.close()
    assert len(list(read_pairs(path, warnings.append))) == 4
    for content in (b"", b"torn"):
        path.write_bytes(content)
        with PairsLog(path) as log:
            assert log.offset == 0 == path.stat().st_size


@pytest.mark.parametrize(
    "old, new, problem",
    [
        ('"text": "ja"', '"text": "je"', "does not match its hash"),
        ('"id": 1', '"id": 2', "does not match its hash"),
        ('"weight"', '"weight', "is not JSON"),
        ('"responses"', '"answers"', "is not a pair"),
        ("kürzer", "k\udcffrzer", "is not JSON"),  # invalid UTF-8
        (None, "[]", "is not a pair"),
        (None, "", "is not JSON"),
    ],
)
def test_damage_is_named(tmp_path, old, new, problem):
    path = tmp_path / "pairs.jsonl"
    with PairsLog(path) as log:
        log.append(batch()[1:])
        log.append(batch())
    lines = path.read_text().splitlines()
    lines[1] = lines[1].replace(old, new) if old else new
    path.write_bytes("".join(line + "\n" for line in lines).encode(errors="surrogateescape"))
    pairs = read_pairs(path)
    assert next(pairs)["position"] == 5
    with pytest.raises(ValueError) as caught:
        next(pairs)
    assert str(caught.value) == f"{path}, line 2: {problem}; restore the file, or delete that line"


def test_a_missing_log(tmp_path):
    with pytest.raises(ValueError, match="cannot be read .No such file or directory.; give the path"):
        next(read_pairs(tmp_path / "none.jsonl"))


def test_what_does_not_fit_is_refused_whole(tmp_path):
    path = tmp_path / "pairs.jsonl"
    log = PairsLog(path)
    good, bad = batch()
    for change, problem in [
        ({"p_first": float("nan")}, "p_first nan with weight 0.0 is no verdict; mend the judge"),
        ({"p_first": 1.5}, "p_first 1.5 with weight 0.0 is no verdict; mend the judge"),
        ({"weight": 1.0}, "p_first None with weight 1.0 is no verdict; mend the judge"),
        ({"weight": float("inf")}, "p_first None with weight inf is no verdict; mend the judge"),
        ({"row": {"a": {1}}}, "set does not fit into JSON; keep to text, numbers and lists in rows"),
    ]:
        with pytest.raises(ValueError) as caught:
            log.append([good, bad | change])
        assert str(caught.value) == f"{path}: step 3, position 5: {problem}"
    with pytest.raises(ValueError, match="position None: the record lacks position, hash, row"):
        log.append([{"step": 1}])
    assert log.offset == 0 == path.stat().st_size
    log.close()


def test_a_full_disk_leaves_whole_lines(tmp_path):
    path = tmp_path / "pairs.jsonl"
    log = PairsLog(path)
    log.append(batch())
    before = path.read_bytes()
    with files_of_at_most(len(before) + 100), pytest.raises(ValueError) as caught:
        log.append(batch())
    assert str(caught.value) == f"{path}: cannot be written (File too large); free space"
    assert path.read_bytes() == before
    log.append(batch())
    log.close()
    assert path.read_bytes() == 2 * before
    assert json.loads(before.splitlines()[0])["step"] == 3
