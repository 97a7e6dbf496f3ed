"""From a pairs log to a preference data set as other trainers read it, and back.

    python -m tools.pairs LOG [LOG ...] --out=FILE.jsonl                  pairs.jsonl -> prompt, chosen, rejected
    python -m tools.pairs DATA [DATA ...] --model=MODEL --out=LOG.jsonl   the other way

LOG is pairs.jsonl of a run, or a glob in quotes. FILE has one JSON object per line, in TRL's conversational format:
"prompt", a list of messages; "chosen" and "rejected", a list of one message each; and "p_chosen", the judge's
probability that chosen is better, a column more than others need. Ties and pairs without a verdict are left out.

DATA is such a file, or one of another format that config.data.train takes; prompt, chosen and rejected may be plain
texts. MODEL is a folder, owner/name on the hub or "embedded", whose tokenizer makes tokens of the answers, an end token
after each. The result is what config.offline.pairs takes. Where there is no p_chosen it is 1.

Way and back lose the ties, the reasons, the order of the two answers (chosen becomes the first), whether an answer was
finished, and token boundaries that the tokenizer would have set otherwise. So train from pairs.jsonl where you have it.

The last line is one JSON object with the counts.

Examples:
  python -m tools.pairs runs/paraphrase/pairs.jsonl --out=dpo.jsonl
  python -m tools.pairs "runs/paraphrase/pairs*.jsonl" --out=dpo.jsonl
  python -m tools.pairs dpo.jsonl --model=embedded --out=my_pairs.jsonl

Exit status: 0 done, 2 something to mend (one line says what), 130 interrupted.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tools.cli import Parser, exit_status
from xpo_jax.data import validate
from xpo_jax.data.offline_pairs import log_files
from xpo_jax.data.pairs_log import content_hash, read_pairs
from xpo_jax.data.rows import DataError, Row
from xpo_jax.data.sources import read_rows
from xpo_jax.io.files import atomic_write, to_json
from xpo_jax.models.hf import hub, model_folder

COLUMNS = ("prompt", "chosen", "rejected", "p_chosen")


def preference(record: Mapping[str, Any]) -> dict[str, Any] | str:
    """A record of the log as a row of a preference data set, or the reason why it is none."""
    p = record["p_first"]
    if not record["weight"]:
        return "no verdict"
    if p == 0.5:
        return "ties"
    first, second = ([{"role": "assistant", "content": each["text"]}] for each in record["responses"])
    chosen, rejected = (first, second) if p > 0.5 else (second, first)
    sure = max(p, 1 - p)
    return dict(zip(COLUMNS, (record["messages"], chosen, rejected, sure), strict=True))


def pair(row: Row, position: int, tokenizer: Any, end_token: int) -> dict[str, Any]:
    """A row of a preference data set as a record of the log.

    Args:
      position: its place in the data set; the order in which load_pairs reads the records.
      end_token: put after each answer.

    Raises:
      DataError: a column that is missing or holds something else, with file and row.
    """
    prompt = validate.column(row, "prompt")
    if isinstance(prompt, str):
        messages: Sequence[Any] = [
            {"role": "user", "content": validate.text(prompt, row.at, "column 'prompt'")}
        ]
    else:
        messages = validate.conversation(prompt, row.at, "column 'prompt'")
    p = row.values.get("p_chosen", 1.0)
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        raise DataError(f"{row.at}: column 'p_chosen' must be a number from 0 to 1, found {p!r}")
    responses = []
    for name in ("chosen", "rejected"):
        answer = validate.column(row, name)
        if isinstance(answer, Sequence) and len(answer) == 1 and isinstance(answer[0], Mapping):
            answer = answer[0].get("content") if answer[0].get("role") == "assistant" else None
        if not isinstance(answer, str):
            raise DataError(
                f"{row.at}: column {name!r} must be a text, or a list of one message of the assistant's"
            )
        tokens = [*tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"], end_token]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        responses.append({"tokens": tokens, "text": text, "finished": True})
    values = {name: value for name, value in row.values.items() if name not in COLUMNS[1:]}
    return {
        "step": 0,
        "position": position,
        "hash": content_hash(messages, values, responses[0]["text"], responses[1]["text"]),
        "row": values,
        "messages": messages,
        "responses": responses,
        "shown": None,
        "flipped": None,
        "p_first": float(p),
        "weight": 1.0,
        "reason": "",
        "scores": {},
        "failure": None,
    }


def run(argv: Sequence[str]) -> int:
    """Read, write and print; returns the exit status."""
    parser = Parser(prog="python -m tools.pairs", description=__doc__, usage="see below")
    parser.add_argument("sources", nargs="+", help="pairs logs; with --model preference data")
    parser.add_argument("--out", required=True, help="the file to write")
    parser.add_argument("--model", help="make a pairs log, with this model's tokenizer")
    options = parser.parse_args(argv)
    counts: Counter[str] = Counter()
    written: list[Mapping[str, Any]] = []
    if options.model is None:
        for record in (record for file in log_files(options.sources) for record in read_pairs(file)):
            found = preference(record)
            if isinstance(found, str):
                counts[found] += 1
                continue
            counts["with an unfinished answer"] += not all(each["finished"] for each in record["responses"])
            written.append(found)
    else:
        folder = hub.find(options.model).folder
        tokenizer = model_folder.load_tokenizer(folder, model_folder.read_config(folder))
        end_token = model_folder.end_token_ids(folder, tokenizer)[0]
        rows = read_rows(options.sources)
        written = [pair(row, position, tokenizer, end_token) for position, row in enumerate(rows)]
    if not written:
        raise ValueError(f"{', '.join(options.sources)}: no pair has a verdict that prefers one answer")
    atomic_write(options.out, "".join(to_json(each) + "\n" for each in written))
    print(to_json({"out": options.out, "pairs": len(written), **counts}))
    return 0


def main(argv: Sequence[str]) -> int:
    """Convert; returns the exit status."""
    return exit_status("pairs", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
