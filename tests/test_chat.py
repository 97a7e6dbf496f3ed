"""tools.chat: its answers are the sampler's, files are answered row by row, and invalid input is one line."""

import dataclasses
import functools
import json
import re

import jax
import numpy as np
import pytest
from fake_models import CHATML, ENDS, SPEAKING, graphdef, random_params, write_model, write_tokenizer
from tiny_run import write_rows
from tokenizers import decoders, pre_tokenizers

from tools.chat import __main__ as chat
from xpo_jax.algorithm.sampler import make_sampler, row_keys
from xpo_jax.algorithm.sampling import Sampling
from xpo_jax.models.decoder_family import unstack
from xpo_jax.runtime.rng import Stream

GREEDY = Sampling(max_new_tokens=12, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
FLAGS = ["--max_new_tokens=12", "--repetition_penalty=1.0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("model")))


def run(capsys, *argv):
    status = chat.main([str(argument) for argument in argv])
    out, err = capsys.readouterr()
    return status, out, err


# the byte tokenizer numbers the bytes in the order of the characters that represent them
CHARACTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def ids(text):
    """Token ids byte by byte, so that none is a control token."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    return [CHARACTERS.index(c) for piece, _ in split(text) for c in piece]


def turn(role, text):
    return [257, *ids(f"{role}\n{text}"), 258, *ids("\n")]


ANSWER = [257, *ids("assistant\n")]


@functools.cache
def sampler(sampling):
    draw = make_sampler(
        graphdef(SPEAKING, stacked=False), sampling, vocab_size=259, end_tokens=ENDS, pad_token=256
    )
    return jax.jit(draw), unstack(random_params(0, SPEAKING))


def sampled(tokens, sampling=GREEDY, position=0, step=0, seed=0):
    """The sampler's answer to one prompt without special tokens, and whether it is finished."""
    draw, weights = sampler(sampling)
    keys = row_keys(seed, Stream.CHAT, np.int32(step), np.array([position], np.int32), np.int32(0))
    padded = np.array([[*tokens, *[0] * (100 - len(tokens))]], np.int32)
    samples = draw(weights, padded, np.array([len(tokens)], np.int32), np.array([True]), keys)
    row = samples.tokens[0, : samples.lengths[0]].tolist()
    characters = "".join(CHARACTERS[token] for token in row if token < 256)
    return decoders.ByteLevel().decode([characters]), bool(samples.finished[0])


# ---- answers ------------------------------------------------------------------------------------


def test_chat_answer_is_what_the_sampler_draws(model):
    talk = chat.Chat(model, GREEDY, seed=0, dtype="float32")
    messages = [{"role": "system", "content": "Sei kurz."}, {"role": "user", "content": "Hallo <|im_end|>"}]
    prompt = (*turn("system", "Sei kurz."), *turn("user", "Hallo <|im_end|>"), *ANSWER)
    assert talk.reply(messages) == sampled(prompt)
    warm = dataclasses.replace(GREEDY, temperature=1.5)
    drawn = [chat.Chat(model, warm, seed=seed, dtype="float32").reply(messages, turn=2) for seed in (0, 7)]
    assert drawn == [sampled(prompt, warm, step=2, seed=seed) for seed in (0, 7)]
    assert drawn[0] != drawn[1]


def test_conversation_later_turns_see_earlier_ones(model, monkeypatch, capsys):
    lines = iter(["Eins", "", "Zwei", "/new", "Drei"])
    monkeypatch.setattr(chat, "typed", lambda: lines)
    status, out, err = run(capsys, f"--model={model}", "--temperature=0", "--system=Kurz", *FLAGS)
    assert status == 0
    first, cut = (
        sampled((*turn("system", "Kurz"), *turn("user", "Eins"), *ANSWER))[0],
        " [truncated at --max_new_tokens]",
    )
    history = (
        *turn("system", "Kurz"),
        *turn("user", "Eins"),
        *turn("assistant", first),
        *turn("user", "Zwei"),
    )
    answers = [
        sampled((*turn("system", "Kurz"), *turn("user", "Eins"), *ANSWER)),
        sampled((*history, *ANSWER)),
    ]
    answers.append(sampled((*turn("system", "Kurz"), *turn("user", "Drei"), *ANSWER)))
    assert out == "".join(chat.visible(text) + ("" if finished else cut) + "\n" for text, finished in answers)
    assert re.search(r" s, without compilation: [\d,.]+ tokens/s\n$", err)


def test_conversation_beyond_the_context_is_an_error_and_not_truncated(model, monkeypatch, capsys):
    monkeypatch.setattr(chat, "typed", lambda: iter(["x" * 200, "Kurz"]))
    status, out, err = run(capsys, f"--model={model}", "--temperature=0", *FLAGS)
    assert status == 0
    assert (
        "conversation, row 1: the conversation has 219 tokens, but only 116 fit beside --max_new_tokens"
        in err
    )
    assert out.startswith(chat.visible(sampled((*turn("user", "Kurz"), *ANSWER))[0]))
    status, out, err = run(capsys, f"--model={model}", "x" * 200, *FLAGS)
    assert (status, out) == (2, "") and err.startswith("chat: PROMPT, row 1: the conversation has 219 tokens")


def test_embedded_model_gets_its_tags(capsys):
    status, out, err = run(
        capsys, "Der Koch kaufte gestern ein Auto.", "--temperature=0", "--max_new_tokens=40"
    )
    assert status == 0
    assert out.startswith("<pphr_output>") and out.endswith("</pphr_output>\n")
    assert "the embedded model: each turn is put into <pphr_input>{input}</pphr_input>" in err


def test_chat_template_arguments_reach_the_template(tmp_path, capsys):
    folder = write_model(tmp_path / "model")
    write_tokenizer(folder, CHATML.replace("assistant\n' }}", "assistant\n' + (mood or '') }}"))
    argv = [f"--model={folder}", "Hallo", "--temperature=0", *FLAGS]
    status, out, _ = run(capsys, *argv, '--chat_template_arguments={"mood": "calm"}')
    assert status == 0
    assert out.startswith(chat.visible(sampled((*turn("user", "Hallo"), *ANSWER, *ids("calm")))[0]))
    for value, problem in (
        ("[1]", "a JSON object in braces"),
        ("{mood", "no JSON"),
        ('{"moods": 1}', "no moods"),
    ):
        status, out, err = run(capsys, *argv, f"--chat_template_arguments={value}")
        assert (status, out) == (2, "") and problem in err


# ---- files --------------------------------------------------------------------------------------

ROWS = [{"text": "x" * (3 + 7 * i % 40), "number": i} for i in range(7)]


def answers(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_file_is_answered_row_by_row(model, tmp_path, capsys):
    prompts = write_rows(tmp_path / "rows.jsonl", ROWS)
    by_size = []
    for size in (3, 16):
        out = tmp_path / f"{size}.jsonl"
        argv = [
            f"--prompts={prompts}",
            "--column=text",
            f"--out={out}",
            f"--batch_size={size}",
            "--temperature=1.5",
        ]
        status, printed, err = run(capsys, f"--model={model}", *argv, *FLAGS, "--top_k=0", "--top_p=1.0")
        assert (status, printed) == (0, "") and err.endswith("tokens/s\n")
        by_size.append(answers(out))
    assert by_size[0] == by_size[1]  # the draws do not depend on the batches
    warm = dataclasses.replace(GREEDY, temperature=1.5)
    for i, (row, answer) in enumerate(zip(ROWS, by_size[0], strict=True)):
        text, finished = sampled((*turn("user", row["text"]), *ANSWER), warm, position=i)
        assert answer == {**row, "answer": text, "finished": finished}


def test_template_may_name_any_column(model, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    argv = [f"--prompts={write_rows(tmp_path / 'rows.jsonl', ROWS[:1])}", f"--out={out}", "--temperature=0"]
    template = "{input}, {{text}}: {text}"
    assert run(capsys, f"--model={model}", *argv, f"--template={template}", "--column=text", *FLAGS)[0] == 0
    assert answers(out)[0]["answer"] == sampled((*turn("user", "xxx, {text}: xxx"), *ANSWER))[0]


def test_column_may_hold_a_conversation(model, tmp_path, capsys):
    turns = [("user", "Hallo"), ("assistant", "Ja?"), ("user", "Nein")]
    rows = [{"chat": [{"role": role, "content": text} for role, text in turns]}]
    out = tmp_path / "out.jsonl"
    argv = [f"--prompts={write_rows(tmp_path / 'rows.jsonl', rows)}", f"--out={out}", "--temperature=0"]
    assert run(capsys, f"--model={model}", *argv, "--column=chat", *FLAGS)[0] == 0
    tokens = tuple(token for role, text in turns for token in turn(role, text))
    assert answers(out) == [
        {**rows[0], **dict(zip(("answer", "finished"), sampled((*tokens, *ANSWER)), strict=True))}
    ]


def test_answers_before_a_failure_are_kept(model, tmp_path, capsys, monkeypatch):
    answer, calls = chat.Chat.answer, []

    def failing(self, batch, turn=0):
        calls.append(batch)
        if len(calls) == 3:
            raise ValueError("the device is gone")
        return answer(self, batch, turn)

    monkeypatch.setattr(chat.Chat, "answer", failing)
    prompts, out = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "out.jsonl"
    argv = [f"--prompts={prompts}", "--column=text", f"--out={out}", "--batch_size=2", *FLAGS]
    status, _, err = run(capsys, f"--model={model}", *argv)
    assert status == 2 and err.endswith("chat: the device is gone\n")
    assert [row["number"] for row in answers(out)] == [0, 1, 2, 3]
    status, _, err = run(capsys, f"--model={model}", *argv)
    assert status == 2 and err.endswith(f"chat: {out}: the file exists; give another --out, or remove it\n")


def test_chat_compiles_few_shapes(model):
    talk = chat.Chat(model, GREEDY, seed=0, dtype="float32")
    for length in (
        1,
        5,
        8,
        30,
        60,
        70,
    ):  # with 24 tokens of template: 32, 32, 32, 64, 116 (all there is), 116
        talk.reply([{"role": "user", "content": "x" * length}])
    assert sorted(talk._compiled) == [(1, 32), (1, 64), (1, 116)]


# ---- invalid input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--model=/nowhere", "Hallo"], "/nowhere is not a folder"),
        (["--temperature=-1", "Hallo"], "temperature is -1.0, must be 0 (greedy) or more"),
        (["--top_p=x", "Hallo"], "argument --top_p: invalid float value: 'x'"),
        (["--top=1", "Hallo"], "unrecognized arguments: --top=1"),
        (["--template=no placeholder", "Hallo"], "template: has no {column}"),
        (["--template={text}", "Hallo"], "PROMPT, row 1: no column 'text'; the row has: input"),
        ([""], "PROMPT, row 1: column 'input' is empty"),
        (["--prompts=embedded:held_out"], "--prompts requires --out"),
        (["--prompts=a", "--out=b", "Hallo"], "--prompts requires --out"),
        (["--column=text", "Hallo"], "--column names a column of --prompts"),
        (["--prompts=none.jsonl", "--out=b"], "none.jsonl: no such file in "),
        (["--prompts={rows}", "--out=b"], "row 1: no column 'input'; the row has: text, number"),
        (["--prompts={done}", "--out=b"], "row 1: the row has a column 'answer' or 'finished'; rename it"),
        (
            ["--prompts={rows}", "--column=text", "--out=none/b", *FLAGS],
            "none/b: cannot be written (No such file or directory)",
        ),
        (
            ["--max_new_tokens=128", "Hallo"],
            "--max_new_tokens=128 leaves no room for a prompt in the model's context of 128 tokens",
        ),
        (["--batch_size=0", "Hallo"], "--batch_size=0"),
        (["--seed=-1", "Hallo"], "--seed=-1"),
    ],
)
def test_main_invalid_input_is_one_line(model, tmp_path, capsys, monkeypatch, argv, expected):
    monkeypatch.chdir(tmp_path)
    files = {
        "{rows}": write_rows(tmp_path / "rows.jsonl", ROWS),
        "{done}": write_rows(tmp_path / "done.jsonl", [{"input": "x", "answer": "y"}]),
    }
    for name, file in files.items():
        argv = [argument.replace(name, file) for argument in argv]
    argv = argv if any(argument.startswith("--model=") for argument in argv) else [f"--model={model}", *argv]
    status, out, err = run(capsys, *argv)
    *before, last = err.splitlines()
    assert (status, out) == (2, "") and last.startswith("chat: ") and expected in last
    assert all(line.startswith("answering") for line in before)


def test_main_tokenizer_without_chat_template_is_one_line(tmp_path, capsys):
    folder = write_model(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    status, _, err = run(capsys, f"--model={folder}", "Hallo")
    assert (status, err) == (
        2,
        f"chat: {folder}: the tokenizer has no chat template; use an instruction-tuned model\n",
    )


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as raised:
        chat.main(["--help"])
    assert raised.value.code == 0
    assert "--prompts=embedded:held_out --out=answers.jsonl" in capsys.readouterr().out
