"""Chat with a model or a run's export, or answer a file of prompts with it, using the project's own sampler.

    python -m tools.chat [--model=FOLDER_OR_NAME] [PROMPT]

Without PROMPT it starts a conversation: each line of input is a turn, /new clears the history, and the end of input
(Ctrl-D) ends it. With --prompts it answers a jsonl file and writes each row to --out with the columns "answer" and
"finished" (an end token came before --max_new_tokens), batch by batch in the order of the file.

The user's turn is the template with {input} filled in; with --prompts the template may name any column, and --column
selects the one that is {input}. Without --template the turn is the text itself (or the conversation in --column); the
embedded model, which was trained on nothing else, gets <pphr_input>{input}</pphr_input>. The model's chat template is
applied to every conversation. One that exceeds the model's context is an error; it is never truncated.

Examples:
  python -m tools.chat "Der Koch kaufte gestern ein Auto."
  python -m tools.chat --model=runs/paraphrase/export --template='<pphr_input>{input}</pphr_input>' --temperature=0
  python -m tools.chat --model=Qwen/Qwen2.5-0.5B-Instruct --system="You are brief." "Why is the sky blue?"
  python -m tools.chat --model=Qwen/Qwen3-0.6B --chat_template_arguments='{"enable_thinking": false}' "Hello"
  python -m tools.chat --prompts=embedded:held_out --out=answers.jsonl
  python -m tools.chat --model=path/to/model --prompts=rows.jsonl --column=question --out=answers.jsonl

Answers go to standard output, everything else to standard error. Exit status: 0 done, 2 invalid input (one line
explains), 130 interrupted.

Left out on purpose: streaming of tokens (the sampler returns complete answers), and more than one device: vLLM can
serve a model that does not fit on one device from the same folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from xpo_jax.algorithm.sampling import Sampling
from xpo_jax.data import conversations, templates, validate
from xpo_jax.data.rows import DataError, Prompt, Row
from xpo_jax.data.sources import read_rows
from xpo_jax.io.files import append_whole, to_json
from xpo_jax.io.text import visible
from xpo_jax.reporting.summary import progress
from xpo_jax.values import Message

from ..cli import Parser, exit_status, path_argument
from .model import Chat

EMBEDDED_TEMPLATE = "<pphr_input>{input}</pphr_input>"
# from Qwen2.5's generation_config.json; max_new_tokens leaves room for a prompt in the embedded model's context
DEFAULTS = Sampling(
    max_new_tokens=256, temperature=0.7, top_k=20, top_p=0.8, min_p=0.0, repetition_penalty=1.05
)


def conversation(
    row: Row, template: str | None, column: str | None, system: str | None
) -> tuple[Message, ...]:
    """Return a row's conversation: the filled-in template, or the text or conversation in its column.

    Raises:
      DataError: a column that is missing or unusable.
    """
    name = column or "input"
    if template is None:
        prompt = conversations.parse(validate.column(row, name), row.at, f"column {name!r}")
    else:
        values = {**row.values, "input": validate.column(row, name)} if column else row.values
        prompt = cast(str, templates.fill(template, row._replace(values=values)))
    messages = tuple(conversations.as_messages(prompt))
    if system is None:
        return messages
    if messages[0]["role"] == "system":
        raise DataError(f"{row.at}: column {name!r} has a system turn already; omit --system")
    return (Message(role="system", content=system), *messages)


def answer_file(
    chat: Chat, rows: Sequence[Row], prompts: Sequence[Prompt], out: Path, batch_size: int
) -> None:
    """Answer all prompts, and append each batch to `out` when it is done.

    Raises:
      ValueError: a file that already exists or cannot be written.
    """
    try:
        with open(out, "xb", buffering=0) as file:
            done = 0
            batches = progress(list(chat.batches(prompts, batch_size)), f"answering {len(prompts)} prompts")
            for batch in batches:
                texts, finished = chat.answer(batch)
                lines = [
                    to_json({**row.values, "answer": text, "finished": bool(end)}) + "\n"
                    for row, text, end in zip(rows[done:], texts, finished, strict=False)
                ]
                append_whole(file, "".join(lines).encode())
                os.fsync(file.fileno())
                done += len(texts)
    except FileExistsError as error:
        raise ValueError(f"{out}: the file exists; give another --out, or remove it") from error
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error.strerror}); give another --out") from error


def converse(chat: Chat, template: str | None, system: str | None, lines: Iterator[str]) -> None:
    """Hold a conversation over several turns, until the lines end."""
    history: tuple[Message, ...] = ()
    for turn, line in enumerate(lines):
        if line.strip() == "/new":
            history = ()
        elif line.strip():
            row = Row("turn", turn + 1, {"input": line.strip()})
            messages = history + conversation(row, template, None, None if history else system)
            try:
                text, finished = chat.reply(messages, turn)
            except DataError as error:
                print(f"{error} (/new starts a new conversation)", file=sys.stderr)
                continue
            print(visible(text) + ("" if finished else " [truncated at --max_new_tokens]"), flush=True)
            history = (*messages, Message(role="assistant", content=text))


def typed() -> Iterator[str]:
    """Yield the lines of standard input, with a prompt if it is a terminal."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def _json_object(text: str) -> dict[str, Any]:
    """Return the JSON object that an argument of the command line holds."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no JSON ({error}): {text}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"a JSON object in braces is expected, found {text}")
    return value


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; `sampling` of the result is its Sampling.

    Raises:
      ValueError: an argument that is unknown, impossible, or incompatible with another.
    """
    parser = Parser(prog="python -m tools.chat", description=__doc__)
    parser.add_argument("prompt", nargs="?", help="one prompt; without it, a conversation")
    parser.add_argument("--model", default="embedded", help="a folder, owner/name on the hub, or embedded")
    parser.add_argument("--system", help="the system turn at the start of each conversation")
    parser.add_argument("--template", help="the user's turn, with {input} or {COLUMN} to fill in")
    parser.add_argument("--prompts", help="jsonl to answer: a path, a glob, embedded:held_out")
    parser.add_argument("--column", help="with --prompts: the column that is {input}")
    parser.add_argument("--out", type=path_argument, help="with --prompts: the jsonl file to write")
    parser.add_argument("--batch_size", type=int, default=16, help="with --prompts: prompts per batch (16)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of compute")
    parser.add_argument(
        "--chat_template_arguments",
        type=_json_object,
        help='a JSON object with values for variables of the chat template: {"enable_thinking": false}',
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random keys (0)")
    for field in dataclasses.fields(Sampling):
        default = getattr(DEFAULTS, field.name)
        parser.add_argument(f"--{field.name}", type=type(default), default=default, help=f"({default})")
    options = parser.parse_args(argv)
    file = options.prompts is not None
    if file != (options.out is not None) or (file and options.prompt is not None):
        raise ValueError("--prompts requires --out and excludes PROMPT; --out requires --prompts")
    if options.column is not None and not file:
        raise ValueError("--column names a column of --prompts; omit it, or give --prompts")
    if options.batch_size < 1:
        raise ValueError(f"--batch_size={options.batch_size}: must be at least 1")
    if not 0 <= options.seed < 2**31:
        raise ValueError(f"--seed={options.seed}: must be at least 0 and below 2**31")
    if options.template is not None:
        templates.check(options.template)
    options.sampling = Sampling(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Sampling)})
    return options


def run(options: argparse.Namespace) -> int:
    """Answer the prompt, the file or the conversation; return the exit status."""
    template = options.template
    if template is None and options.model == "embedded":
        template = EMBEDDED_TEMPLATE
        print(f"the embedded model: each turn is put into {template}", file=sys.stderr)
    rows = read_rows(options.prompts) if options.prompts else []
    clashes = [row.at for row in rows if {"answer", "finished"} & set(row.values)]
    if clashes:
        raise ValueError(f"{clashes[0]}: the row has a column 'answer' or 'finished'; rename it")
    if options.prompt is not None:
        rows = [Row("PROMPT", 1, {"input": options.prompt})]
    conversations = [conversation(row, template, options.column, options.system) for row in rows]
    chat = Chat(
        options.model,
        options.sampling,
        seed=options.seed,
        dtype=options.dtype,
        chat_template_arguments=options.chat_template_arguments,
    )
    prompts = [chat.prompt(messages, row) for messages, row in zip(conversations, rows, strict=True)]
    if options.prompts:
        answer_file(chat, rows, prompts, options.out, options.batch_size)
    elif options.prompt is not None:
        converse(chat, template, options.system, iter([options.prompt]))
    else:
        converse(chat, template, options.system, typed())
    print(chat.speed(), file=sys.stderr)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Chat; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return exit_status("chat", lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
