"""An error in a run's input is reported in one line, with exit status 2, and leaves nothing half-made behind."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_models import SPEAKING, write_model
from ml_collections import ConfigDict
from tiny_run import one_device, one_sequence_length, run_main, tiny_config, write_config, write_rows

from xpo_jax.checkpointing import checkpoint

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a model, its prompts, and a config that is valid but for its judge, which never runs."""
    folder = tmp_path_factory.mktemp("input")
    config = tiny_config(folder)
    config.judge = ConfigDict({"name": "fakes:Broken", "at": 0})
    write_config(folder / "config.py", config)
    return folder


NUMBERS = itertools.count()


def error_of(folder, *overrides, spec=None, run_dir=None):
    """Return the one line that the command prints for this input, without "xpo_jax: "."""
    refused = folder / f"refused_{next(NUMBERS)}"
    argv = [f"--config={spec or folder / 'config.py'}", f"--config.run_dir={run_dir or refused / 'run'}"]
    status, out, err = run_main(argv + [f"--config.{override}" for override in overrides])
    assert out == ""
    assert not refused.exists()
    return line(status, err)


def line(status, err):
    assert status == 2, err
    assert "Traceback" not in err
    (only,) = err.splitlines()
    assert only.startswith("xpo_jax: ") and len(only) < 700
    return only.removeprefix("xpo_jax: ")


# ---- the command line and the config ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "--config is missing; for example --config=paraphrase"),
        (["--config="], "--config needs a value: --config=..."),
        (["--config={config}", "train"], "argument 'train' is not understood"),
        (["--config={config}", "--steps=4"], "argument '--steps=4' is not understood"),
        (["--config={config}", "--config={config}"], "--config is given twice"),
        (["--config={config}", "--config.steps"], "--config.steps needs a value"),
        (["--config={folder}/none.py"], "none.py: there is no such file"),
        (["--config={folder}/none.json"], "none.json: there is no such file"),
        (["--config={folder}"], ": a config is a .py file (or file.py:argument) or a .json file"),
        (["--config={folder}/train.jsonl"], "train.jsonl: a config is a .py file"),
    ],
)
def test_command_line(folder, argv, expected):
    names = {"config": folder / "config.py", "folder": folder}
    status, out, err = run_main([argument.format(**names) for argument in argv])
    assert out == "" and expected in line(status, err)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("loss.alhpa=1", "loss.alhpa: no such field; did you mean 'loss.alpha'?"),
        ("alpha=1", "alpha: no such field; did you mean 'loss.alpha'?"),
        ("steps=many", "steps: an integer is expected, found 'many'"),
        ("steps=1.5", "steps: an integer is expected, found '1.5'"),
        ("loss.beta=nan", "loss.beta: a finite number is expected, found 'nan'"),
        ("data.shuffle=maybe", "data.shuffle: true or false is expected, found 'maybe'"),
        ("loss=1", "loss is a group; override one of its fields"),
        ("loss.name=hinge", "loss.name: 'hinge' is unknown; choose sigmoid, ipo, or one of yours"),
        (
            "loss.second_candidate=None",
            "loss.second_candidate: 'reference' or 'policy' is expected, found None",
        ),
        (
            "model.dtype=float16",
            "model.dtype: 'auto' or 'float32' or 'bfloat16' is expected, found 'float16'",
        ),
    ],
)
def test_unknown_and_mistyped_fields(folder, override, expected):
    assert error_of(folder, override).startswith(expected)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c["loss"].update({"gamma": 1.0}), "loss.gamma: no such field"),
        (lambda c: c.update({"stpes": 1}), "config.stpes: no such field; did you mean 'steps'?"),
        (lambda c: c["loss"].pop("beta"), "loss.beta is missing: a number or a mapping is expected"),
        (lambda c: c.pop("sampling"), "config.sampling is missing"),
        (
            lambda c: c["judge"].pop("name"),
            'config: judge.name is missing: give the name of a built-in judge or "package.module:Name"',
        ),
        (lambda c: c.pop("seed"), "config.seed is missing: an integer is expected"),
        (
            lambda c: c["data"].update({"take": "all"}),
            "data.take: an integer or None is expected, found 'all'",
        ),
        (lambda c: c["data"].update({"train": []}), "the list of sources is empty; name at least one"),
        (
            lambda c: c["judge"].update({"name": "fakes:Broken"}),
            "judge.at is missing: an integer is expected",
        ),
        (lambda c: c.update({"loss": 3}), "config.loss: a mapping is expected, found 3"),
    ],
)
def test_config_files_with_the_wrong_fields(folder, tmp_path, change, expected):
    values = tiny_config(folder).to_dict()
    change(values)
    spec = tmp_path / "config.json"
    spec.write_text(json.dumps(values))
    assert error_of(folder, spec=spec).startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def get_config(arg):\n    return {\n", "config.py, line 2: SyntaxError: '{' was never closed"),
        ("import nothing_of_that_name\n", "config.py, line 1: ModuleNotFoundError: No module named"),
        (
            "def get_config(arg):\n\n    return 1 / 0\n",
            "config.py, line 3: ZeroDivisionError: division by zero",
        ),
        ("def get_config():\n    pass\n", "config.py: get_config must take one argument"),
        ("config = 3\n", "config.py: has no get_config(arg)"),
        ("def get_config(arg):\n    return {}\n", "config.py: get_config must return a ConfigDict"),
    ],
)
def test_config_files_that_are_broken(folder, tmp_path, text, expected):
    (tmp_path / "config.py").write_text(text)
    assert f"{tmp_path}/{expected}" in error_of(folder, spec=tmp_path / "config.py")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["loss.alpha=0.1"], "loss at step 0: alpha 0.1 >= beta 0.1, where the loss has no minimum"),
        (["loss.alpha=0.5", "loss.name=ipo", "loss.beta=0"], "loss at step 0: beta is 0.0, must be positive"),
        (["loss.alpha=-1e-3"], "loss at step 0: alpha is -0.001, must be 0 (online DPO) or more"),
        (
            ['loss.alpha={"kind": "linear", "start": 0.0, "end": 0.2, "steps": 4}'],
            "loss at step 2: alpha 0.1 >= beta 0.1, where the loss has no minimum; lower loss.alpha",
        ),
        (
            ['loss.beta={"kind": "cosine", "start": 0.1, "end": 0.0, "steps": 3}'],
            "loss at step 3: beta is 0.0, must be positive",
        ),
        (['loss.alpha={"kind": "linear", "start": 0.0}'], "loss.alpha.end is missing: a number is expected"),
        (
            ['loss.alpha={"kind": "steep", "start": 0.0, "end": 0.0, "steps": 4}'],
            "loss.alpha.kind: 'linear' or 'cosine' is expected, found 'steep'",
        ),
        (["loss.flip_rate=0.5"], "loss.flip_rate is 0.5, must be from 0 (off) to below 0.5"),
        (["loss.bonus=curved"], "loss.bonus: 'linear' or 'bounded' is expected, found 'curved'"),
        (["loss.bonus_clip=0"], "loss.bonus_clip is 0.0, must be positive"),
        (["loss.entropy_weight=-1"], "loss.entropy_weight is -1.0, must be 0 (off) or more"),
        (
            ["optimizer.warmup_steps=4"],
            "optimizer: warmup_steps 4 >= steps 4: the run would end before the peak",
        ),
        (["optimizer.learning_rate=0"], "optimizer.learning_rate is 0.0, must be positive"),
        (["optimizer.clip_norm=-1"], "optimizer.clip_norm is -1.0, must be positive"),
        (["steps=0"], "config.steps is 0, must be at least 1"),
        (["batch_size=0"], "config.batch_size is 0, must be at least 1"),
        (["seed=-1"], "config.seed is -1, must be from 0 to 2147483647"),
        (["sampling.temperature=0"], "sampling: training needs a temperature above 0"),
        (
            ["sampling.repetition_penalty=1.2"],
            "sampling: training needs a temperature above 0 and a repetition_penalty",
        ),
        (["sampling.top_p=0"], "sampling.top_p is 0.0, must be in (0, 1]"),
        (["sampling.max_new_tokens=0"], "sampling.max_new_tokens is 0, must be at least 1"),
        (["layout.micro_batch_rows=0"], "layout.micro_batch_rows is 0, must be at least 1"),
        (["layout.chunk_tokens=0"], "layout.chunk_tokens is 0, must be at least 1"),
        (["evaluation.prompts=1"], "evaluation.prompts is 1, must be at least 2"),
        (["evaluation.every_steps=-1"], "evaluation.every_steps is -1, must be at least 0"),
        (["checkpoint.keep_last=0"], "checkpoint.keep_last is 0, must be at least 1, or None"),
        (["logging.table_every_steps=0"], "logging.table_every_steps is 0, must be at least 1"),
        (["data.buckets=40,32"], "data.buckets: increasing positive integers are expected, found [40, 32]"),
        (["data.buckets=16,32"], "data.buckets: the last one, 32, is shorter than max_prompt_tokens = 40"),
        (["data.take=0"], "data.take: must be at least 1, or None for all rows; got 0"),
        (["data.column=text"], "data.column: set either template or column, and the other to None"),
        (["data.template=same"], "data.template: has no {column}, so every prompt would be the same"),
        (["mesh.data=3"], "mesh: data 3 x fsdp 2 x tensor 2 is not the 8 device(s) here"),
        (["mesh.fsdp=0"], "mesh: sizes are positive and at most one is -1"),
        (["batch_size=6"], "batch_size 6 is not divisible by mesh.data x mesh.fsdp = 4"),
    ],
)
def test_values_that_are_out_of_range_or_inconsistent(folder, overrides, expected):
    assert error_of(folder, *overrides).startswith(expected)


# ---- the judge ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "paraphrasing",
            "judge.name: 'paraphrasing' is unknown; choose paraphrase, llm, reasoning, openai, reward_model, ",
        ),
        ("nothing_here:Judge", "judge.name: no module 'nothing_here', seen from "),
        ("fakes:Longest", "judge.name: module 'fakes' has no 'Longest'; did you mean 'LongerText'?"),
        ("tiny_run:TRAIN_ROWS", "judge.name: tiny_run:TRAIN_ROWS is 21, which cannot be called"),
        ("fakes:LongerText", "judge.at: no such field"),
        ("fakes:Slow", "judge.at: no such field; did you mean"),
        ("paraphrase", "judge.at: no such field"),
    ],
)
def test_judges_that_are_not_there_or_take_other_fields(folder, name, expected):
    assert error_of(folder, f"judge.name={name}").startswith(expected.removesuffix("; did you mean"))


@pytest.mark.parametrize(
    ("judge", "expected"),
    [
        ({"name": "fakes:Turning", "at": 10}, "the judge answered the int 1, which is refused"),
        (
            {"name": "fakes:Miscounting"},
            "the judge gave no verdict on any of the first 32 pairs: the judge was asked 8 comparisons and returned 7",
        ),
        (
            {"name": "fakes:prose"},
            "the judge gave no verdict on any of the first 32 pairs: the judge answered 'Answer A is better because"
            " it is more polite.'; a text answer",
        ),
        (
            {"name": "fakes:Broken", "at": 9},
            "the judge gave no verdict on more than 50% of the pairs in 2 batches in a row; in the last of them:"
            " the judge failed: KeyError: 'the\\nserver is gone' (fakes.py, line ",
        ),
    ],
)
def test_judges_that_break_the_contract_in_the_middle_of_a_run(
    folder, tmp_path, shared_programs, judge, expected
):
    """The evaluation before the first step makes eight calls, so call number 10 is in step 3. That is
    where an integer ends the run at once, and an exception at its second time."""
    config = tiny_config(folder)
    config.judge = ConfigDict(judge)
    config.run_dir, config.data.buckets = str(tmp_path / "run"), (40,)
    with one_device(), one_sequence_length():
        status, out, err = run_main([f"--config={write_config(tmp_path / 'config.py', config)}"])
    assert status == 2 and "Traceback" not in err
    *_, last = err.splitlines()
    assert last.startswith(f"xpo_jax: {expected}")
    assert not out.splitlines()[-1].startswith("{")
    steps = [json.loads(text)["step"] for text in lines(tmp_path / "run" / "metrics.jsonl")]
    assert steps == ([0, 1, 2] if "at" in judge else [])
    if "at" in judge:  # the state before the step that got no verdict
        assert last.endswith(f"; the last weights are in {tmp_path}/run/checkpoints/2")
        assert checkpoint.latest(tmp_path / "run" / "checkpoints") == 2
    assert not (tmp_path / "run" / "result.json").exists()


def lines(file):
    return file.read_text().splitlines() if file.exists() else []


def test_prompts_that_the_judge_cannot_judge(folder):
    """Every prompt is checked before anything is compiled, not at the first evaluation."""
    config = REPOSITORY / "configs" / "paraphrase.py"
    error = error_of(folder, "data.template=Schreibe um: {input}", spec=config)
    assert (
        ", row 1: paraphrase judge: the last user turn has no text between <pphr_input> and </pphr_input>"
        in error
    )


# ---- the data -----------------------------------------------------------------------------------

GOOD = b'{"text": "Guten Tag"}\n'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "{file}: no such file in "),
        (b"", "{file}: the file is empty; write one JSON object per line"),
        (b"\n \n", "{file}: the file is empty"),
        (GOOD + b'{"txt": "Guten Tag"}\n', "{file}, row 2: no column 'text'; the row has: txt"),
        (GOOD + b"{}\n", "{file}, row 2: no column 'text'; the row has: nothing"),
        (GOOD + b'{"text": ""}\n', "{file}, row 2: column 'text' is empty"),
        (GOOD + b'{"text": " \\n"}\n', "{file}, row 2: column 'text' is empty"),
        (GOOD + b'{"text": null}\n', "{file}, row 2: column 'text' must be text, got None"),
        (GOOD + b'\n{"text": 3.5}\n', "{file}, row 3: column 'text' must be text, got 3.5"),
        (GOOD + b'{"text": ["a"]}\n', "{file}, row 2: column 'text' must be text, got ['a']"),
        (GOOD + b'["text"]\n', "{file}, row 2: must be a JSON object"),
        (GOOD + b'{"text": "Guten Tag"\n', "{file}, row 2: not JSON: "),
        (
            GOOD + b'{"text": "Gr\xfc\xdfe"}\n',
            "{file}, row 2: not UTF-8: byte 0xfc at position 13 of the line",
        ),
        (GOOD + b'{"text": "\\ud83d"}\n', "{file}, row 2: column 'text' holds half a surrogate pair"),
        (
            GOOD + b'{"text": "%s"}\n' % (b"x" * 60),
            "{file}, row 2: the prompt has 79 tokens, more than max_prompt_tokens = 40; raise it, or set on_long",
        ),
    ],
)
@pytest.mark.parametrize("which", ["train", "held_out"])
def test_rows_that_cannot_be_used(folder, tmp_path, which, content, expected):
    file = tmp_path / "rows.jsonl"
    if content is not None:
        file.write_bytes(content)
    assert error_of(folder, f"data.{which}={file}").startswith(expected.format(file=file))


USER, ANSWER = {"role": "user", "content": "Hallo"}, {"role": "assistant", "content": "Ja?"}


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        ([USER, ANSWER], "column 'chat' ends with the assistant's turn; the last must be the user's"),
        ([{"role": "system", "content": "Sei kurz."}], "column 'chat' ends with the system's turn"),
        ([], "column 'chat' has no messages"),
        ([USER, {"role": "system", "content": "Halt"}, USER], "turn 2 of column 'chat' is a system turn"),
        ([{"role": "bot", "content": "Hallo"}, USER], "turn 1 of column 'chat' has the unknown role 'bot'"),
        ([{"role": "user"}], "turn 1 of column 'chat' must have role and content, it has: role"),
        ([{"role": "user", "content": 3}], "the content of turn 1 of column 'chat' must be text, got 3"),
        (["Hallo"], "turn 1 of column 'chat' must be a message with role and content, got 'Hallo'"),
        ({"role": "user", "content": "Hallo"}, "column 'chat' must be text or a list of messages"),
    ],
)
def test_conversations_that_cannot_be_used(folder, tmp_path, conversation, expected):
    file = write_rows(tmp_path / "rows.jsonl", [{"chat": [USER]}, {"chat": conversation}])
    error = error_of(folder, "data.template=None", "data.column=chat", f"data.train={file}")
    assert error.startswith(f"{file}, row 2: {expected}")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.train={folder}/no*.jsonl"], "/no*.jsonl: no file matches in "),
        (["data.train={folder}"], ": is a directory; write "),
        (
            ["data.train=embedded:dev"],
            "embedded:dev: no such embedded prompts; name one of embedded:train",
        ),
        (
            ["data.max_prompt_tokens=10", "data.on_long=drop"],
            "no prompt is left of 21 rows (max_prompt_tokens dropped 21)",
        ),
    ],
)
def test_sources_without_rows(folder, overrides, expected):
    assert expected in error_of(folder, *(override.format(folder=folder) for override in overrides))


# ---- the model ----------------------------------------------------------------------------------


@pytest.fixture
def copy(folder, tmp_path):
    """Return a copy of the model, to be damaged, and a function that returns the error of a run with it."""
    import shutil

    model = shutil.copytree(folder / "model", tmp_path / "model")
    return model, lambda *overrides: error_of(folder, f"model.path={model}", *overrides)


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_no_model(folder, tmp_path):
    assert error_of(folder, f"model.path={tmp_path}/none") == (
        f"{tmp_path}/none is not a folder; give a Hugging Face model folder, a hub name (owner/name), or 'embedded'"
    )
    assert error_of(folder, f"model.path={tmp_path}").startswith(
        f"{tmp_path}/config.json is missing; give a complete"
    )
    assert error_of(folder, f"model.reference={tmp_path}/none").startswith(f"{tmp_path}/none is not a folder")


def test_models_of_another_kind(copy):
    model, model_error = copy
    edit(model / "config.json", model_type="mistral")
    assert "model_type is 'mistral'; xpo_jax computes qwen2" in model_error()
    (model / "config.json").write_text("{")
    assert f"{model}/config.json is not valid JSON" in model_error()


def test_a_tokenizer_larger_than_the_model(copy):
    model, model_error = copy
    edit(model / "config.json", vocab_size=258)
    assert model_error().startswith(f"{model}: the tokenizer has 259 tokens, the model only 258 rows")


def test_a_mesh_that_does_not_divide_the_model(folder, tmp_path):
    model = write_model(tmp_path / "model", config=dataclasses.replace(SPEAKING, vocab_size=265))
    expected = (
        "embed_tokens.embedding: 265 is not divisible by mesh.tensor=2;"
        " sizes that would work on 8 devices: mesh.tensor 1"
    )
    assert error_of(folder, f"model.path={model}") == expected


def test_a_missing_or_damaged_tokenizer(copy):
    model, model_error = copy
    (model / "tokenizer.json").write_text("{}")
    assert model_error().startswith(f"{model}: transformers cannot read the tokenizer (")
    (model / "tokenizer.json").unlink()
    assert model_error().startswith(f"{model} has no tokenizer.json; copy the tokenizer files")


def test_end_tokens_that_the_tokenizer_does_not_have(copy):
    model, model_error = copy
    edit(model / "generation_config.json", eos_token_id=[999])
    assert "eos_token_id 999 is not one of the tokenizer's 259 tokens" in model_error()


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        (["data.max_prompt_tokens=125", "data.buckets=125"], " to 3 or lower data.max_prompt_tokens to 120"),
        (["sampling.max_new_tokens=128"], "; lower sampling.max_new_tokens to 88"),
    ],
)
def test_prompts_and_responses_beyond_the_positions_of_the_model(folder, flags, remedy):
    message = error_of(folder, *flags)
    assert message.startswith("data.max_prompt_tokens: prompts of ") and message.endswith(remedy)
    assert "but the model has 128" in message


def test_no_chat_template(copy):
    model, model_error = copy
    edit(model / "tokenizer_config.json", chat_template=None)
    assert (
        "train.jsonl, row 1: a conversation needs a chat template and the tokenizer has none" in model_error()
    )


def test_a_reference_of_another_architecture(copy, folder):
    model, _ = copy
    edit(model / "config.json", rope_theta=1e6)
    error = error_of(folder, f"model.reference={model}")
    assert error.startswith(f"model.reference: {model} ") and "architecture" in error
    assert f"{folder}/model" in error


def test_weights_that_are_missing_damaged_or_of_another_shape(copy):
    """These are reported before anything is compiled."""
    model, model_error = copy
    file = model / "model.safetensors"
    whole = file.read_bytes()
    edit(model / "config.json", intermediate_size=32)
    assert (
        "the weights do not fit config.json; 6 mis-shaped: model.layers.0.mlp.down_proj.weight"
        in model_error()
    )
    edit(model / "config.json", intermediate_size=24, num_hidden_layers=3)
    assert "the weights do not fit config.json; 12 missing: model.layers.2" in model_error()
    edit(model / "config.json", num_hidden_layers=2)
    file.write_bytes(whole[:-100])
    assert model_error().startswith(f"{file} is damaged")
    file.unlink()
    assert model_error().startswith(f"{model} has neither model.safetensors nor")


# ---- the run directory --------------------------------------------------------------------------


def test_a_foreign_run_directory_is_not_touched(folder, tmp_path):
    (tmp_path / "thesis.tex").write_text("Habe nun, ach!")
    (tmp_path / "config.json").write_text("{}")
    assert error_of(folder, run_dir=tmp_path) == (
        f"{tmp_path}: is not empty and not a run of xpo_jax (it holds config.json, thesis.tex);"
        " give another --config.run_dir"
    )
    assert {file.name for file in tmp_path.iterdir()} == {"thesis.tex", "config.json"}


def test_run_directories_that_cannot_be_made(folder, tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert error_of(folder, run_dir=file) == f"{file}: is not a folder; give another --config.run_dir"
    below = file / "run"
    assert error_of(folder, run_dir=below) == (
        f"{below}: cannot be created (Not a directory); give another --config.run_dir"
    )
    assert error_of(folder, run_dir="/proc/run").startswith("/proc/run: cannot be created (")
    assert error_of(folder, run_dir=" ").startswith("run_dir: is empty; give a folder")
    assert error_of(folder, run_dir="s3://bucket/run").startswith(
        "s3://bucket/run: a run directory is a folder or a gs:// path"
    )


def test_the_run_directory_of_another_config(folder, tmp_path, shared_programs):
    config = tiny_config(folder)
    config.judge = ConfigDict({"name": "fakes:prose"})
    config.run_dir, config.data.buckets = str(tmp_path / "run"), (40,)
    spec = write_config(tmp_path / "config.py", config)
    with one_device(), one_sequence_length():
        run_main([f"--config={spec}"])  # ends in its first evaluation, before anything worth keeping
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    before = {file: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    assert error_of(folder, "loss.beta=0.2", spec=spec, run_dir=tmp_path / "run") == (
        f"{tmp_path}/run: is a run of another config (loss.beta: 0.1 there, 0.2 here); give another --config.run_dir,"
        " or add --accept-changes to resume with this config"
    )
    assert {file: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before


# ---- as a user meets it -------------------------------------------------------------------------


def command(*argv, cwd, **variables):
    """Run `python -m xpo_jax.main` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}", **variables}
    done = subprocess.run(
        [sys.executable, "-m", "xpo_jax.main", *map(str, argv)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def test_help(tmp_path):
    for flag in ("--help", "-h"):
        status, out, err = run_main([flag, "--config=nowhere.py"])
        assert (status, err) == (0, "")
        assert "python -m xpo_jax.main --config=FILE" in out
        listed = (
            r"^  ifeval +A real model .*\n  offline_dpo +Offline DPO: .*\n  paraphrase +The worked example: "
        )
        assert re.search(listed, out, re.MULTILINE)
    status, out, err = command("--help", cwd=tmp_path)
    assert (status, err) == (0, "") and out.startswith("Steer a language model towards what a judge prefers")


def test_a_field_that_is_not_there_in_a_process_of_its_own(folder):
    status, out, err = command("--config=config.py", "--config.loss.alhpa=1", cwd=folder)
    assert out == "" and line(status, err) == "loss.alhpa: no such field; did you mean 'loss.alpha'?"


def test_a_row_without_its_column_in_a_process_of_its_own(folder, tmp_path):
    """Everything that a run imports is imported, and none of it may write to standard error."""
    write_rows(tmp_path / "rows.jsonl", [{"satz": "Guten Tag"}])
    argv = [f"--config={folder}/config.py", "--config.run_dir=run", "--config.data.train=rows.jsonl"]
    status, out, err = command(*argv, cwd=tmp_path)
    assert out == "" and line(status, err) == "rows.jsonl, row 1: no column 'text'; the row has: satz"
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_the_example_of_the_repository_is_a_valid_config(folder):
    """All of its groups are read, down to the model, which is replaced by a missing one."""
    example = REPOSITORY / "configs" / "paraphrase.py"
    error = error_of(folder, f"model.path={folder}/none", spec=example)
    assert re.fullmatch(r".*/none is not a folder; .*", error)
