"""What is shared with user code stays what it was: judges, checks, parts and sources get or give copies."""

import copy

import numpy as np
import pytest
from fake_data import load_data

from xpo_jax.judges import answers, contract
from xpo_jax.judges.ask import ResponsePairs, ask
from xpo_jax.judges.combine import Combination
from xpo_jax.values import Comparison, Prompts, Verdict

ROW = {"text": "Ja.", "tags": ["short"], "more": {"n": [1]}}
MESSAGES = ({"role": "user", "content": "Ja."},)


class Editor:
    """Edits in place all that it is given, and returns the same objects again."""

    def __init__(self):
        self.seen, self.scores, self.measures = [], {"a": [0]}, {"valid": [0]}

    def _edit(self, messages, row):
        self.seen.append(copy.deepcopy((messages, row)))
        messages[0]["content"] = "edited"
        row["tags"].append("edited")
        row["more"]["n"][0] = 2
        row.clear()

    def __call__(self, comparisons):
        for c in comparisons:
            self._edit(c.messages, c.row)
        verdicts = []
        while comparisons:
            comparisons.pop()
            self.scores["a"][0] += 1
            verdicts.append(Verdict(1.0, "", self.scores))
        return verdicts

    def check(self, messages, row):
        self._edit(messages, row)

    def parts(self, messages, text):
        self._edit(messages, copy.deepcopy(ROW))
        self.measures["valid"][0] += 1
        return self.measures


@pytest.fixture(autouse=True)
def unchanged():
    """Fail a test that leaves the module's row or messages edited."""
    before = copy.deepcopy((ROW, MESSAGES))
    yield
    assert before == (ROW, MESSAGES)


def comparisons(count):
    return [Comparison(MESSAGES, ROW, "a", "b") for _ in range(count)]


@pytest.mark.parametrize("both_orders", [False, True])
def test_judge_that_edits_comparisons_sees_each_as_it_was_and_changes_none(both_orders):
    judge, shown = Editor(), comparisons(2)
    judged = answers.compare(judge, shown, both_orders=both_orders)
    assert shown == comparisons(2) and all(result.verdict.p is not None for result in judged)
    assert judge.seen == [(MESSAGES, ROW)] * (2 * (1 + both_orders))


def test_scores_that_a_judge_edits_after_it_has_returned_them_stay_what_they_were():
    judge = Editor()
    first = answers.call_judge(judge, comparisons(1))
    answers.call_judge(judge, comparisons(1))
    assert first[0].scores == {"a": [1]}


def test_parts_of_a_combined_judge_get_copies_of_their_own():
    editor, reader = Editor(), Editor()
    combined = Combination({"editor": (1.0, editor), "reader": (1.0, reader)}, "mean")
    answers.call_judge(combined, comparisons(1))
    assert editor.seen == reader.seen == [(MESSAGES, ROW)]
    contract.check(combined, MESSAGES, ROW)
    assert editor.seen == reader.seen == [(MESSAGES, ROW)] * 2
    measures = contract.measure(combined, MESSAGES, "a")
    contract.measure(combined, MESSAGES, "a")
    assert measures == {"valid": [1], "reader/valid": [1]}
    assert editor.seen == reader.seen == [(MESSAGES, ROW)] * 4


def test_batch_that_an_editing_judge_was_asked_about_is_unchanged():
    prompts = Prompts(
        (ROW, ROW),
        (MESSAGES, MESSAGES),
        np.zeros((2, 1), np.int32),
        np.ones(2),
        np.arange(2),
        np.ones(2, bool),
    )
    finished = np.ones(2, bool)
    pairs = ResponsePairs(["a", "b"], ["c", "d"], ~finished, finished, finished)
    options = {"unfinished_loses": False, "both_orders": True, "hide_thinking": False, "shown_seed": (0,)}
    verdicts = ask(Editor(), prompts, pairs, **options)
    assert verdicts.queries == 4 and verdicts.weight.tolist() == [1, 1]
    assert prompts.rows == (ROW, ROW) and prompts.messages == (MESSAGES, MESSAGES)


def test_check_that_edits_a_prompt_does_not_change_it(data_folder, tokenizer):
    class Removing:
        def check(self, messages, row):
            messages[0].clear()
            row.clear()

    judge = Removing()
    data = load_data(
        tokenizer, train="good.jsonl", check=lambda messages, row: contract.check(judge, messages, row)
    )
    assert [prompt.row.values for prompt in data.train.prompts] == [
        {"text": "Guten Morgen."},
        {"text": "Ja."},
    ]
    assert data.train.prompts[0].messages[0] == {"role": "user", "content": "Guten Morgen."}


SOURCES = """
row = {"text": "", "tags": [0]}

def again():
    for i in range(3):
        row["text"], row["tags"][0] = f"number {i}", i
        yield row

class Again:
    def __len__(self):
        return 3

    def __getitem__(self, i):
        row["text"], row["tags"][0] = f"number {i}", i
        return row

class Kept:
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return KEPT[i]

KEPT = [{"text": f"number {i}", "tags": [i]} for i in range(3)]
"""


@pytest.mark.parametrize("name", ["again", "Again", "Kept"])
def test_source_that_yields_the_same_dict_again_gives_its_rows(data_folder, tokenizer, monkeypatch, name):
    (data_folder / f"sharing_{name}.py").write_text(SOURCES)
    monkeypatch.syspath_prepend(str(data_folder))
    data = load_data(tokenizer, train=f"sharing_{name}:{name}")
    expected = [{"text": f"number {i}", "tags": [i]} for i in range(3)]
    assert [prompt.row.values for prompt in data.train.prompts] == expected
    for prompt in data.train.prompts:
        prompt.row.values["tags"].append("edited")
    again = load_data(tokenizer, train=f"sharing_{name}:{name}")
    assert [prompt.row.values for prompt in again.train.prompts] == expected


def test_rows_of_a_source_do_not_change_with_the_source(data_folder, monkeypatch):
    from xpo_jax.data.sources import read_rows

    (data_folder / "sharing_rows.py").write_text(SOURCES)
    monkeypatch.syspath_prepend(str(data_folder))
    for name in ("again", "Again"):
        assert [row.values["tags"] for row in read_rows(f"sharing_rows:{name}")] == [[0], [1], [2]]
