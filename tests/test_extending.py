"""What CONTRIBUTING.md promises: a loss, a judge, a model family and a source are added without an edit of the package.

The toy parts stand in tests/extending; CONTRIBUTING.md shows pieces of them.
"""

import re
from pathlib import Path

import pytest
from extending.toy_judge import MostOften
from extending.toy_source import sums
from fakes import write_tokenizer
from transformers import AutoTokenizer

from xpo_jax.data.prompts import load_prompts
from xpo_jax.experiment.setup import make_judge
from xpo_jax.judges import JUDGES
from xpo_jax.judges.contract import compare
from xpo_jax.values import Comparison

ROOT = Path(__file__).parents[1]
RECIPES = re.findall(
    r"^```python\n# (tests/extending/\w+\.py)\n(.*?)^```$",
    (ROOT / "CONTRIBUTING.md").read_text(),
    re.DOTALL | re.MULTILINE,
)


def test_contributing_shows_a_recipe_for_every_toy_part():
    shown = {path for path, _ in RECIPES}
    assert shown == {f"tests/extending/{path.name}" for path in (ROOT / "tests" / "extending").glob("*.py")}


@pytest.mark.parametrize(("path", "code"), RECIPES)
def test_recipe_code_is_the_code_that_is_tested(path, code):
    pieces = [piece for piece in re.split(r"^\.\.\.\n", code, flags=re.MULTILINE) if piece.strip()]
    source = (ROOT / path).read_text()
    for piece in pieces:
        assert piece.strip("\n") in source


# ---- a judge ----------------------------------------------------------------------------------------

COMPARISONS = [Comparison((), {}, a, b) for a, b in (("see", "sea"), ("sea", "see"), ("tea", "sea"))]


@pytest.mark.parametrize("name", ["extending.toy_judge:MostOften", "most_often"])
def test_judge_is_made_by_its_name_with_its_settings(name, monkeypatch):
    monkeypatch.setitem(JUDGES, "most_often", MostOften)
    judge = make_judge({"name": name, "text": "e"}, "judge")
    verdicts = [judged.verdict for judged in compare(judge, COMPARISONS, both_orders=True)]
    assert [verdict.p for verdict in verdicts] == [1.0, 0.0, 0.5]
    assert verdicts[0].scores["a"] == 2
    assert verdicts[0].scores["b"] == 1


@pytest.mark.parametrize(
    ("group", "field"),
    [({"text": ""}, "judge.text"), ({"text": 3}, "judge.text"), ({"word": "e"}, "judge.word")],
)
def test_judge_with_a_wrong_setting_is_refused_by_field(group, field):
    with pytest.raises(ValueError, match=rf"^{field}\b|judge: {field}\b"):
        make_judge({"name": "extending.toy_judge:MostOften", **group}, "judge")


# ---- a source ---------------------------------------------------------------------------------------


def test_source_is_read_by_its_name(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path))
    data = load_prompts(
        train="extending.toy_source:sums",
        held_out=["extending.toy_source:sums"],
        select=None,
        rename=None,
        template=({"role": "user", "content": "{text}"},),
        column=None,
        filter_tokens=None,
        filter_length=False,
        max_prompt_tokens=40,
        buckets=(40,),
        on_long="error",
        on_bad_row="error",
        deduplicate=False,
        take=None,
        shuffle=False,
        tokenizer=tokenizer,
        max_new_tokens=8,
        check=None,
    )
    assert [dict(prompt.row.values) for prompt in data.train.prompts] == sums()
    assert [prompt.messages[0]["content"] for prompt in data.held_out.prompts] == [
        row["text"] for row in sums()
    ]
    batch = data.train_batches(4, seed=0)[0]
    assert batch.rows[1] == {"text": "0+1=", "sum": 1}
