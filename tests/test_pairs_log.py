"""The pairs log: records are read as they were written, on disk before the update; damage is located."""

import hashlib
import json
import os

import numpy as np
import pytest
from fake_data import PAIR_MESSAGES, follows, logged_pairs
from file_helpers import files_of_at_most, strict

from xpo_jax.data import pairs_log
from xpo_jax.data.pairs_log import PairsLog, content_hash, read_pairs
from xpo_jax.io.files import to_json

FIRST = {
    "step": 3,
    "position": 4,
    "row": {"id": 1, "score": 0.1},
    "messages": PAIR_MESSAGES,
    "prompt_tokens": [0, 0],
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


def test_content_hash_is_sha256_of_sorted_ascii_json():
    text = '[[{"content":"Sag \\u201eja\\u201c!","role":"user"}],{"id":1,"score":0.1},"ja","Ja.\\nJa!"]'
    digest = hashlib.sha256(text.encode("ascii")).hexdigest()
    row = {"score": np.float32(0.1), "id": 1}  # a float32 is written as 0.1
    assert content_hash(PAIR_MESSAGES, row, "ja", "Ja.\nJa!") == digest
    assert content_hash([{"content": "Sag „ja“!", "role": "user"}], row, "ja", "Ja.\nJa!") == digest
    assert content_hash(PAIR_MESSAGES, row, "Ja.\nJa!", "ja") != digest
    assert (
        content_hash(PAIR_MESSAGES, {**row, "style": "brief"}, "ja", "Ja.\nJa!") != digest
    )  # a judge may read it
    assert content_hash([], {}, "ab", "c") != content_hash([], {}, "a", "bc")
    odd = {"x": float("nan"), "nested": {1: [np.int64(2)]}, "half": "\ud83d"}
    assert content_hash([], odd, "", "") == content_hash([], json.loads(to_json(odd)), "", "")


def test_read_pairs_returns_what_append_wrote(tmp_path):
    path = tmp_path / "pairs.jsonl"
    log = PairsLog(path)
    assert log.offset == 0
    log.append(logged_pairs())
    assert log.offset == path.stat().st_size
    lines = path.read_text().splitlines()
    assert [strict(line)["position"] for line in lines] == [4, 5]
    assert strict(lines[0]) == FIRST | {"hash": content_hash(PAIR_MESSAGES, FIRST["row"], "ja", "Ja.\nJa!")}
    failed = strict(lines[1])
    assert (failed["p_first"], failed["weight"], failed["failure"]) == (None, 0.0, "timed out")
    assert failed["responses"][0] == {"tokens": [6, 7, 8], "text": "ja ja", "finished": False}
    assert failed["responses"][1]["text"] == "\ud83d" and failed["shown"] is None
    log.append([])
    log.append(logged_pairs()[:1])
    log.close()
    warnings = []
    assert [pair["position"] for pair in read_pairs(path, warnings.append)] == [4, 5, 4]
    assert warnings == []


def test_append_syncs_before_it_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(pairs_log.os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    with PairsLog(tmp_path / "pairs.jsonl") as log:
        log.append(logged_pairs())
    assert synced == [log.offset] and log.offset > 0


def test_incomplete_last_line_is_ignored_and_cut_off(tmp_path, caplog):
    path = tmp_path / "pairs.jsonl"
    log = PairsLog(path)
    long = {"long": "x" * 100_000}
    log.append(
        [
            logged_pairs()[0] | {"row": long, "hash": content_hash(PAIR_MESSAGES, long, "ja", "Ja.\nJa!")},
            logged_pairs()[1],
        ]
    )
    complete = log.offset
    log.close()
    with open(path, "ab") as file:
        file.write(b'{"step": 4, "row": "' + b"x" * 200_000)  # longer than one block of the search
    warnings = []
    assert len(list(read_pairs(path, warnings.append))) == 2
    assert warnings == [f"{path}, line 3: incomplete, 200020 bytes are ignored"]
    log = PairsLog(path)
    assert caplog.messages == [f"{path}: an incomplete last line of 200020 bytes is cut off"]
    assert log.offset == complete == path.stat().st_size
    log.append(logged_pairs())
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
        ('"responses"', '"answers"', "is not a pair record"),
        ("kürzer", "k\udcffrzer", "is not JSON"),  # invalid UTF-8
        (None, "[]", "is not a pair record"),
        (None, "", "is not JSON"),
    ],
)
def test_read_pairs_damaged_record_names_line_and_remedy(tmp_path, old, new, problem):
    path = tmp_path / "pairs.jsonl"
    with PairsLog(path) as log:
        log.append(logged_pairs()[1:])
        log.append(logged_pairs())
    lines = path.read_text().splitlines()
    lines[1] = lines[1].replace(old, new) if old else new
    path.write_bytes("".join(line + "\n" for line in lines).encode(errors="surrogateescape"))
    pairs = read_pairs(path)
    assert next(pairs)["position"] == 5
    with pytest.raises(ValueError) as caught:
        next(pairs)
    assert follows(str(caught.value), f"{path}, line 2: {problem} ... restore the file, or delete that line")


def test_read_pairs_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl: .*No such file or directory.*give the path"):
        next(read_pairs(tmp_path / "none.jsonl"))


def test_append_bad_record_writes_nothing(tmp_path):
    path = tmp_path / "pairs.jsonl"
    log = PairsLog(path)
    good, bad = logged_pairs()
    for change, problem in [
        ({"p_first": float("nan")}, "p_first nan with weight 0.0 ... fix the judge"),
        ({"p_first": 1.5}, "p_first 1.5 with weight 0.0 ... fix the judge"),
        ({"weight": 1.0}, "p_first None with weight 1.0 ... fix the judge"),
        ({"weight": float("inf")}, "p_first None with weight inf ... fix the judge"),
        ({"row": {"a": {1}}}, "set ... JSON; use only text, numbers and lists in rows"),
    ]:
        with pytest.raises(ValueError) as caught:
            log.append([good, bad | change])
        assert follows(str(caught.value), f"{path}: step 3, position 5: {problem}")
    with pytest.raises(ValueError, match="position None: .*position, hash, row"):
        log.append([{"step": 1}])
    assert log.offset == 0 == path.stat().st_size
    log.close()


def test_append_full_disk_leaves_complete_lines(tmp_path):
    path = tmp_path / "pairs.jsonl"
    log = PairsLog(path)
    log.append(logged_pairs())
    before = path.read_bytes()
    with files_of_at_most(len(before) + 100), pytest.raises(ValueError) as caught:
        log.append(logged_pairs())
    assert follows(str(caught.value), f"{path}: ... File too large ... free space")
    assert path.read_bytes() == before
    log.append(logged_pairs())
    log.close()
    assert path.read_bytes() == 2 * before
    assert json.loads(before.splitlines()[0])["step"] == 3
