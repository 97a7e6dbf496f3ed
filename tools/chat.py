"""Talk to a model or an export of a run, or let it answer a file of prompts, through the project's own sampler.

    python -m tools.chat [--model=FOLDER_OR_NAME] [PROMPT]

Without PROMPT it is a conversation: each line is a turn, /new forgets what was said, the end of input (Ctrl-D) ends
it. With --prompts a jsonl file is answered, and --out gets each row with "answer" and "finished" (an end token came
before --max_new_tokens), written batch by batch in the order of the file.

What the user says is the template with {input} filled in; with --prompts it may name any column, and --column says
which one is {input}. Without --template it is the text itself (or the conversation that --column holds); the
embedded model, which knows nothing else, gets <pphr_input>{input}</pphr_input>. All goes through the model's chat
template. A conversation that outgrows the model's context is an error and never cut.

Examples:
  python -m tools.chat "Der Koch kaufte gestern ein Auto."
  python -m tools.chat --model=runs/paraphrase/export --template='<pphr_input>{input}</pphr_input>' --temperature=0
  python -m tools.chat --model=Qwen/Qwen2.5-0.5B-Instruct --system="You are brief." "Why is the sky blue?"
  python -m tools.chat --prompts=embedded:held_out --out=answers.jsonl
  python -m tools.chat --model=path/to/model --prompts=rows.jsonl --column=question --out=answers.jsonl

Answers go to standard output, all else to standard error. Exit status: 0 done, 2 invalid input (one line says
what), 130 interrupted.

Left out on purpose: answers that appear token by token (the sampler returns whole ones), and more than one device:
a model that one device cannot hold is served from the same folder by vLLM.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from flax import nnx

from tools.cli import Parser, exit_status
from xpo_jax.algorithm.programs import compute_dtype
from xpo_jax.algorithm.sampler import Sampling, make_sampler, row_keys
from xpo_jax.data import templates, validate
from xpo_jax.data.batches import Batches
from xpo_jax.data.rows import DataError, Prompt, Row
from xpo_jax.data.sources import read_rows
from xpo_jax.io.files import append_whole, to_json
from xpo_jax.io.text import visible
from xpo_jax.models.hf import hub, model_folder
from xpo_jax.models.qwen2 import Qwen2
from xpo_jax.reporting.summary import progress
from xpo_jax.runtime.rng import Stream
from xpo_jax.values import Message, Prompts, Samples

EMBEDDED_TEMPLATE = "<pphr_input>{input}</pphr_input>"
# Qwen2.5's own generation_config.json; no more tokens than leave room for a prompt in the embedded model
DEFAULTS = Sampling(
    max_new_tokens=256, temperature=0.7, top_k=20, top_p=0.8, min_p=0.0, repetition_penalty=1.05
)


class Chat:
    """A model that answers; programs are compiled as their shapes come up, and kept.

    Prompts are padded to powers of two, so that there are few of them.

    Args:
      model: a folder, a hub name, or "embedded".
      sampling: how answers are drawn. seed: of the draws.

    Raises:
      ValueError: a model that cannot be used, a tokenizer without chat template, an answer longer than the context.
    """

    def __init__(self, model: str, sampling: Sampling, *, seed: int, dtype: str = "auto"):
        folder = str(hub.find(model).folder)
        config = model_folder.read_config(folder)
        self.tokenizer = model_folder.load_tokenizer(folder, config)
        if self.tokenizer.chat_template is None:
            raise ValueError(f"{model}: its tokenizer has no chat template; use an instruction-tuned model")
        self.room = config.max_position_embeddings - sampling.max_new_tokens
        if self.room < 1:
            raise ValueError(
                f"--max_new_tokens={sampling.max_new_tokens} leaves no room for a prompt in the model's"
                f" {config.max_position_embeddings} tokens of context; lower it"
            )
        self.pad = model_folder.pad_token_id(folder, self.tokenizer)
        graphdef = nnx.split(nnx.eval_shape(lambda: Qwen2(config, rngs=nnx.Rngs(0), stacked=False)))[0]
        draw = make_sampler(
            graphdef,
            sampling,
            vocab_size=len(self.tokenizer),
            end_tokens=model_folder.end_token_ids(folder, self.tokenizer),
            pad_token=self.pad,
        )

        def sample(weights: Any, tokens: Any, lengths: Any, valid: Any, position: Any, turn: Any) -> Samples:
            return draw(weights, tokens, lengths, valid, row_keys(seed, Stream.CHAT, turn, position, 0))

        self._sample, self._compiled = jax.jit(sample), cast(dict[Any, Any], {})
        self._weights = model_folder.load_weights(folder, config, dtype=compute_dtype(dtype))
        self.tokens, self.seconds = 0, 0.0

    def prompt(self, messages: Sequence[Message], row: Row) -> Prompt:
        """A conversation in the model's chat template; control tokens in a message are ordinary text.

        Raises:
          ValueError: one that the chat template refuses, or that is too long; `row` says where it is.
        """
        try:
            ids = self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
            )
        except Exception as error:  # a chat template is a program of the model's and can refuse in any way
            raise DataError(
                f"{row.at}: the model's chat template refuses the conversation: {error}"
            ) from error
        if len(ids) > self.room:
            raise DataError(
                f"{row.at}: the conversation has {len(ids)} tokens, and there is room for {self.room} beside"
                " --max_new_tokens; shorten it"
            )
        return Prompt(row, tuple(messages), np.asarray(ids, np.int32))

    def batches(self, prompts: Sequence[Prompt], batch_size: int) -> Iterator[Prompts]:
        """The prompts in their order, their positions counted over all of them."""
        powers = (2**i for i in range(4, 32))
        buckets = [*takewhile(lambda width: width < self.room, powers), self.room]
        for number, batch in enumerate(Batches(prompts, batch_size, buckets, self.pad, None)):
            yield batch._replace(position=batch.position + np.int32(number * batch_size))

    def answer(self, batch: Prompts, turn: int = 0) -> tuple[list[str], np.ndarray]:
        """The texts of a batch's valid rows, and which of them are finished, bool[rows].

        Args:
          turn: of a conversation; another one draws other tokens.
        """
        args = (self._weights, batch.tokens, batch.lengths, batch.valid, batch.position, np.int32(turn))
        if batch.tokens.shape not in self._compiled:
            self._compiled[batch.tokens.shape] = self._sample.lower(*args).compile()
        begun = time.monotonic()
        samples = jax.device_get(self._compiled[batch.tokens.shape](*args))
        self.seconds += time.monotonic() - begun
        self.tokens += int(samples.lengths.sum())
        rows = [
            tokens[:n].tolist()
            for tokens, n in zip(samples.tokens[batch.valid], samples.lengths[batch.valid], strict=True)
        ]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True), samples.finished[batch.valid]

    def reply(self, messages: Sequence[Message], turn: int = 0) -> tuple[str, bool]:
        """The answer to one conversation, and whether it is finished."""
        row = Row("conversation", turn + 1, {})
        texts, finished = self.answer(next(self.batches([self.prompt(messages, row)], 1)), turn)
        return texts[0], bool(finished[0])

    def speed(self) -> str:
        """What was sampled so far."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        return f"{self.tokens:,} tokens in {self.seconds:.1f} s of sampling: {rate:,.1f} tokens/s"


def messages_of(
    row: Row, template: str | None, column: str | None, system: str | None
) -> tuple[Message, ...]:
    """The conversation of a row: a template filled in, or the column's text or conversation.

    Raises:
      DataError: a column that is missing or cannot be used.
    """
    name = column or "input"
    if template is None and not isinstance(validate.column(row, name), str):
        said = validate.conversation(validate.column(row, name), row.at, f"column {name!r}")
    else:
        values = {**row.values, "input": validate.column(row, name)} if column else row.values
        text = cast(str, templates.fill(template or "{input}", row._replace(values=values)))
        said = (Message(role="user", content=text),)
    if system is None:
        return said
    if said[0]["role"] == "system":
        raise DataError(f"{row.at}: column {name!r} has a system turn already; leave --system out")
    return (Message(role="system", content=system), *said)


def answer_file(
    chat: Chat, rows: Sequence[Row], prompts: Sequence[Prompt], out: Path, batch_size: int
) -> None:
    """Answer all prompts and append each batch to `out` as soon as it is there.

    Raises:
      ValueError: a file that is there already or cannot be written.
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
        raise ValueError(f"{out} is already there; give another --out, or remove it") from error
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error.strerror}); give another --out") from error


def converse(chat: Chat, template: str | None, system: str | None, lines: Iterator[str]) -> None:
    """A conversation over several turns, until the lines end."""
    history: tuple[Message, ...] = ()
    for turn, line in enumerate(lines):
        if line.strip() == "/new":
            history = ()
        elif line.strip():
            row = Row("turn", turn + 1, {"input": line.strip()})
            asked = history + messages_of(row, template, None, None if history else system)
            try:
                text, finished = chat.reply(asked, turn)
            except DataError as error:
                print(f"{error} (/new starts a new one)", file=sys.stderr)
                continue
            print(visible(text) + ("" if finished else " [cut off at --max_new_tokens]"), flush=True)
            history = (*asked, Message(role="assistant", content=text))


def typed() -> Iterator[str]:
    """The lines of standard input, with a prompt where it is a terminal."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; `sampling` holds its Sampling.

    Raises:
      ValueError: an argument that is not understood, impossible, or does not go with the others.
    """
    parser = Parser(prog="python -m tools.chat", description=__doc__)
    parser.add_argument("prompt", nargs="?", help="one prompt; without it a conversation")
    parser.add_argument("--model", default="embedded", help="a folder, owner/name on the hub, or embedded")
    parser.add_argument("--system", help="the system's turn, first in each conversation")
    parser.add_argument("--template", help="what the user says, with {input} or {column}s to fill in")
    parser.add_argument("--prompts", help="jsonl to answer: a path, a glob, embedded:held_out")
    parser.add_argument("--column", help="of --prompts: the column that is {input}")
    parser.add_argument("--out", type=Path, help="of --prompts: the jsonl to write")
    parser.add_argument("--batch_size", type=int, default=16, help="of --prompts: how many at a time (16)")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="to compute in"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    for field in dataclasses.fields(Sampling):
        default = getattr(DEFAULTS, field.name)
        parser.add_argument(f"--{field.name}", type=type(default), default=default, help=f"({default})")
    options = parser.parse_args(argv)
    file = options.prompts is not None
    if file != (options.out is not None) or (file and options.prompt is not None):
        raise ValueError("--prompts needs --out, and takes no PROMPT; --out needs --prompts")
    if options.column is not None and not file:
        raise ValueError("--column is a column of --prompts; without them leave it out")
    if options.batch_size < 1 or not 0 <= options.seed < 2**31:
        raise ValueError(
            f"--batch_size={options.batch_size} --seed={options.seed}: numbers from 1 and from 0 on"
        )
    if options.template is not None:
        templates.check(options.template)
    options.sampling = Sampling(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Sampling)})
    return options


def run(options: argparse.Namespace) -> int:
    """Do what the command line asks for; returns the exit status."""
    template = options.template
    if template is None and options.model == "embedded":
        template = EMBEDDED_TEMPLATE
        print(f"the embedded model: what is said is put into {template}", file=sys.stderr)
    rows = read_rows(options.prompts) if options.prompts else []
    taken = [row.at for row in rows if {"answer", "finished"} & set(row.values)]
    if taken:
        raise ValueError(f"{taken[0]}: the row has a column 'answer' or 'finished'; rename it")
    if options.prompt is not None:
        rows = [Row("PROMPT", 1, {"input": options.prompt})]
    said = [messages_of(row, template, options.column, options.system) for row in rows]
    chat = Chat(options.model, options.sampling, seed=options.seed, dtype=options.dtype)
    prompts = [chat.prompt(messages, row) for messages, row in zip(said, rows, strict=True)]
    if options.prompts:
        answer_file(chat, rows, prompts, options.out, options.batch_size)
    elif options.prompt is not None:
        converse(chat, template, options.system, iter([options.prompt]))
    else:
        converse(chat, template, options.system, typed())
    print(chat.speed(), file=sys.stderr)
    return 0


def main(argv: Sequence[str]) -> int:
    """Answer; returns the exit status."""
    return exit_status("chat", lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
