"""A run's inputs: everything that the config names by path or import is compared when the run resumes."""

import importlib
import itertools
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
from fake_models import write_model
from tiny_run import HELD_OUT_ROWS, TRAIN_ROWS, changed_config, run_name, write_config, write_rows

from xpo_jax.algorithm.programs import Programs
from xpo_jax.config import loader
from xpo_jax.experiment import inputs
from xpo_jax.experiment.inputs import evaluation_identity, input_fingerprints
from xpo_jax.experiment.run_directory import RunDir
from xpo_jax.experiment.setup import prepare
from xpo_jax.io import fingerprints

# ---- files ----------------------------------------------------------------------------------------


def test_of_file_depends_on_the_content(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    first = fingerprints.of_file(path)
    assert fingerprints.of_file(path) == first
    path.write_bytes(b"abd")
    assert fingerprints.of_file(path) != first


@pytest.mark.parametrize("position", [0, 40_000, -1])
def test_of_file_samples_a_large_file(tmp_path, monkeypatch, position):
    """A change of a tenth of the file is always seen; so are its ends."""
    monkeypatch.setattr(fingerprints, "SAMPLED_BYTES", 1000)
    monkeypatch.setattr(fingerprints, "_BLOCK_BYTES", 100)
    content = bytearray(100_000)
    path = tmp_path / "large"
    path.write_bytes(content)
    first = fingerprints.of_file(path)
    changed = range(position, position + 10_000) if position > 0 else [position]
    for i in changed:
        content[i] = 1
    path.write_bytes(content)
    assert fingerprints.of_file(path) != first


def test_of_files_depends_on_names_and_not_on_order(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text("same")
    a, b, c = (tmp_path / name for name in "abc")
    assert fingerprints.of_files([a, b]) == fingerprints.of_files([b, a]) != fingerprints.of_files([a, c])


def test_of_files_of_one_name_in_any_order_have_one_fingerprint(tmp_path):
    """A judge's package has an __init__.py in each folder, and a set of paths has another order in each process."""
    paths = [tmp_path / folder / "__init__.py" for folder in "abc"]
    for number, path in enumerate(paths):
        path.parent.mkdir()
        path.write_text(f"NUMBER = {number}\n")
    orders = itertools.permutations(paths)
    assert len({fingerprints.of_files(order) for order in orders}) == 1


# ---- the run's inputs -------------------------------------------------------------------------------

JUDGE = "def longer(comparisons):\n    return ['A' if len(c.a) > len(c.b) else 'B' for c in comparisons]\n"


@pytest.fixture
def inputs_of(tmp_path, monkeypatch):
    """Return a function that loads the config again and returns its inputs' fingerprints and evaluation identity."""
    (tmp_path / "my_judge.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_judge", raising=False)  # imported by another test

    def read(**changes):
        config = changed_config(tmp_path, judge__name="my_judge:longer", **changes)
        config = loader.load(write_config(tmp_path / "c.py", config))
        inputs = input_fingerprints(config, prepare(config))
        return inputs, evaluation_identity(config, inputs)

    return read


def append_row(path):
    path.write_text(path.read_text() + json.dumps({"text": "neu", "number": 99}) + "\n")


def change_weights(folder):
    shutil.rmtree(folder)
    write_model(folder, seed=1)


CHANGES = {
    "data.train": lambda folder: append_row(folder / "train.jsonl"),
    "data.held_out": lambda folder: append_row(folder / "held_out.jsonl"),
    "evaluation.answers": lambda folder: write_answers(folder, "andere Antwort"),
    "model.path": lambda folder: change_weights(folder / "model"),
    "model.reference": lambda folder: change_weights(folder / "other"),
    "judge": lambda folder: (folder / "my_judge.py").write_text(JUDGE.replace(">", "<")),
}


def write_answers(folder, answer):
    rows = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    write_rows(folder / "answers.jsonl", [{**row, "answer": answer} for row in rows])


@pytest.mark.parametrize("name", CHANGES)
def test_inputs_a_change_of_the_content_is_seen_where_the_config_names_it(inputs_of, tmp_path, name):
    write_model(tmp_path / "other", seed=2)
    changed_config(tmp_path)  # writes the prompts
    write_answers(tmp_path, "eine Antwort")
    fields = {
        "model__reference": str(tmp_path / "other"),
        "evaluation__answers": str(tmp_path / "answers.jsonl"),
        "evaluation__prompts": HELD_OUT_ROWS,
    }
    before, identity = inputs_of(**fields)
    assert before.keys() == CHANGES.keys()
    assert inputs_of(**fields) == (before, identity)
    CHANGES[name](tmp_path)
    after, other = inputs_of(**fields)
    assert {field for field in before if before[field] != after[field]} == {name}
    assert (other == identity) == (name == "data.train")  # which decides whether cached evaluations are used


NAMED = {
    "its module": ("my_judge.py", JUDGE.replace(">", "<")),
    "a module beside it": ("beside.py", "K = -1\n"),
    "a module that one imports": ("further.py", "F = 2\n"),
    "a file in its fields": ("words.txt", "Katze\n"),
    "a loss": ("my_loss.py", "# another formula\nfrom xpo_jax.algorithm.losses import Sigmoid as Mine\n"),
}


@pytest.mark.parametrize("changed", NAMED)
def test_inputs_what_a_judge_or_loss_of_ones_own_names_is_seen(tmp_path, monkeypatch, changed):
    """They are read in a new process each time, as in a run, so that the modules are imported again."""
    (tmp_path / "my_judge.py").write_text(
        f"import beside\n\n{JUDGE}\n\nclass Listed:\n    def __init__(self, *, path, function):\n        pass\n"
        "    def __call__(self, comparisons):\n        return ['tie' for _ in comparisons]\n"
    )
    (tmp_path / "beside.py").write_text("import further\nK = 1\n")
    (tmp_path / "further.py").write_text("F = 1\n")
    (tmp_path / "unrelated.py").write_text("U = 1\n")
    (tmp_path / "words.txt").write_text("Hund\n")
    (tmp_path / "my_loss.py").write_text("from xpo_jax.algorithm.losses import Sigmoid as Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def read():
        for name in ("my_judge", "beside", "further", "my_loss", "unrelated"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        importlib.import_module("unrelated")
        config = changed_config(tmp_path, loss__name="my_loss:Mine")
        config.judge = {"name": "my_judge:Listed", "path": "words.txt", "function": "my_judge:longer"}
        config = loader.load(write_config(tmp_path / "c.py", config))
        return input_fingerprints(config, prepare(config))

    before = read()
    assert read() == before
    (tmp_path / "unrelated.py").write_text("U = 2\n")
    assert read() == before
    file, content = NAMED[changed]
    (tmp_path / file).write_text(content + ("" if file != "my_judge.py" else (tmp_path / file).read_text()))
    after = read()
    assert {name for name in before if after[name] != before[name]} == {
        "loss" if changed == "a loss" else "judge"
    }


def test_inputs_of_a_function_that_scores_are_seen(inputs_of, tmp_path):
    code = "def score(prompt, answer):\n    return float(len(answer))\n"
    (tmp_path / "my_score.py").write_text(code)
    judge = {"name": "reward_function", "function": "my_score:score", "temperature": 1.0}
    before, _ = inputs_of(judge=judge)
    (tmp_path / "my_score.py").write_text(code.replace("float", "-float"))
    assert inputs_of(judge=judge)[0]["judge"] != before["judge"]
    sys.modules.pop("my_score")


def test_inputs_words_that_are_names_of_folders_are_none(tmp_path, monkeypatch):
    """For pathlib an empty text is the current folder, and "paraphrase" may be the folder of a run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paraphrase").mkdir()
    for folder in (tmp_path, tmp_path / "paraphrase"):
        (folder / "result.json").write_text("{}")
    assert list(inputs._named({"name": "paraphrase", "prefix": "", "labels": ["A", "."]})) == []


@pytest.mark.parametrize(("folder", "expected"), [("site-packages", {"one"}), ("mine", {"one", "two"})])
def test_inputs_what_is_beside_an_installed_package_is_left_out(tmp_path, monkeypatch, folder, expected):
    (tmp_path / folder / "one").mkdir(parents=True)
    (tmp_path / folder / "one" / "__init__.py").write_text("import two\n")
    (tmp_path / folder / "two.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / folder)
    importlib.import_module("one")
    try:
        sources = inputs._sources("one")
    finally:
        for name in ("one", "two"):
            sys.modules.pop(name)
    assert {path.parent.name if path.stem == "__init__" else path.stem for path in sources} == expected


def test_inputs_of_a_judge_that_reads_a_file_or_asks_a_server(tmp_path, monkeypatch):
    """A name in `models` need not be a model on disk."""
    (tmp_path / "words.txt").write_text("Hund\n")

    class Reads:
        def __call__(self, comparisons):
            return ["tie" for _ in comparisons]

        def models(self):
            return [
                {"path": str(tmp_path / "words.txt"), "commit": None},
                {"path": "a-server", "commit": None},
            ]

    judging = SimpleNamespace(judge=Reads())
    before = list(inputs._judge_models(SimpleNamespace(judging=judging)))
    (tmp_path / "words.txt").write_text("Katze\n")
    after = list(inputs._judge_models(SimpleNamespace(judging=judging)))
    assert before[0] != after[0] and before[1] == after[1] == "a-server"


def test_inputs_a_file_that_a_glob_matches_is_seen(inputs_of, tmp_path):
    changed_config(tmp_path)
    pattern = str(tmp_path / "train*.jsonl")
    before, _ = inputs_of(data__train=pattern)
    write_rows(tmp_path / "train_2.jsonl", [{"text": "noch eine", "number": 77}])
    assert inputs_of(data__train=pattern)[0]["data.train"] != before["data.train"]


# ---- a run that resumes -----------------------------------------------------------------------------

CONFIG = '{"data": {"train": "a"}, "evaluation": {"answers": "b"}, "steps": 2}'
BEFORE = {"data.train": "1" * 64, "evaluation.answers": "2" * 64}


@pytest.mark.parametrize("finished", [True, False])
def test_run_with_another_content_is_refused_or_accepted(tmp_path, finished):
    with RunDir.open(tmp_path, CONFIG, BEFORE) as run:
        (tmp_path / "metrics.jsonl").touch()
        if finished:
            run.finish({})
    more, now = CONFIG.replace('"steps": 2', '"steps": 4'), BEFORE | {"data.train": "3" * 64}
    with pytest.raises(ValueError, match=r"data.train: .* 1{12} there, 3{12} here.*--accept-changes"):
        RunDir.open(tmp_path, more, now)
    assert json.loads((tmp_path / "inputs.json").read_text()) == BEFORE
    with RunDir.open(tmp_path, more, now, accept_changes=True) as run:
        assert [line.partition(":")[0] for line in run.changes] == ["steps", "data.train"]
    assert json.loads((tmp_path / "inputs.json").read_text()) == now
    with RunDir.open(tmp_path, more, now) as run:  # which is now what the run reads
        assert run.changes == ()


def test_run_with_other_answers_of_an_evaluation_continues(tmp_path):
    with RunDir.open(tmp_path, CONFIG, BEFORE) as run:
        (tmp_path / "metrics.jsonl").touch()
        fixed = run.fixed
    with RunDir.open(tmp_path, CONFIG, BEFORE | {"evaluation.answers": "4" * 64}) as run:
        assert [line.partition(":")[0] for line in run.changes] == ["evaluation.answers"]
        assert run.fixed == fixed


def test_run_with_another_field_says_nothing_about_its_content(tmp_path):
    with RunDir.open(tmp_path, CONFIG, BEFORE):
        (tmp_path / "metrics.jsonl").touch()
    other, now = CONFIG.replace('"a"', '"c"'), BEFORE | {"data.train": "3" * 64}
    with RunDir.open(tmp_path, other, now, accept_changes=True) as run:
        assert run.changes == ('data.train: "a" there, "c" here',)


def test_replay_on_changed_data_keeps_the_prompts_of_past_pairs(one_device, tmp_path, monkeypatch):
    """Each replayed pair has the prompt that it was sampled for, although the file now has others in its place."""
    config = changed_config(tmp_path, steps=2, replay__updates=2)
    status, _, err = run_name(tmp_path, "run", config)
    assert status == 0, err
    logged = [json.loads(line) for line in (tmp_path / "run" / "pairs.jsonl").read_text().splitlines()]
    rows = [{"text": f"anders {i}", "number": i} for i in range(TRAIN_ROWS)]
    write_rows(tmp_path / "train.jsonl", rows)
    config.steps = 4
    status, _, err = run_name(tmp_path, "run", config)
    assert status == 2 and "data.train: its content is another one" in err and err.count("\n") == 1

    seen, update = [], Programs.update

    def spy(self, state, frozen, pairs, *rest):
        seen.append(pairs)
        return update(self, state, frozen, pairs, *rest)

    monkeypatch.setattr(Programs, "update", spy)
    status, out, err = run_name(tmp_path, "run", config, ["--accept-changes"])
    assert status == 0, err
    assert "data.train: its content is another one" in " ".join(out.split())
    logged += [json.loads(line) for line in (tmp_path / "run" / "pairs.jsonl").read_text().splitlines()]
    known = {
        tuple(pair["responses"][0]["tokens"] + pair["responses"][1]["tokens"]): pair["prompt_tokens"]
        for pair in logged
    }
    replayed = [(pairs, i) for pairs in seen[1::2] for i in range(len(pairs.weight)) if pairs.valid[i]]
    for pairs, i in replayed:
        first, second = (pairs.tokens[s, i, : pairs.lengths[s, i]].tolist() for s in (0, 1))
        assert pairs.prompt_tokens[i, : pairs.prompt_lengths[i]].tolist() == known[tuple(first + second)]
    old = {tuple(pair["prompt_tokens"]) for pair in logged if pair["step"] < 2}
    assert any(tuple(p.prompt_tokens[i, : p.prompt_lengths[i]].tolist()) in old for p, i in replayed)
