"""Convert a pairs log to a preference data set that other trainers read, or such a data set to a pairs log.

    python -m tools.pairs LOG [LOG ...] --out=FILE.jsonl                  pairs.jsonl -> prompt, chosen, rejected
    python -m tools.pairs DATA [DATA ...] --model=MODEL --out=LOG.jsonl   the reverse

LOG is pairs.jsonl of a run, or a glob in quotes. FILE has one JSON object per line, in TRL's conversational format:
"prompt", a list of messages; "chosen" and "rejected", a list of one message each; and an additional column "p_chosen",
the judge's probability that chosen is better. Ties and pairs without a verdict are left out.

DATA is such a file, or any source that config.data.train accepts; prompt, chosen and rejected may be plain text.
MODEL is a folder, owner/name on the hub, or "embedded"; its tokenizer tokenises the responses and appends an end token
to each. config.offline.pairs accepts the result. Without a column p_chosen, the probability is 1.

A round trip loses the ties, the reasons, the order of the two responses (chosen becomes the first), whether a response
was finished, and token boundaries that differ from the tokenizer's. So train from pairs.jsonl if you have it.

The last line is one JSON object with the counts.

Examples:
  python -m tools.pairs runs/paraphrase/pairs.jsonl --out=dpo.jsonl
  python -m tools.pairs "runs/paraphrase/pairs*.jsonl" --out=dpo.jsonl
  python -m tools.pairs dpo.jsonl --model=embedded --out=my_pairs.jsonl

Exit status: 0 done, 2 invalid input (one line on stderr explains), 130 interrupted.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tools.cli import Parser, exit_status, path_argument
from xpo_jax.data import validate
from xpo_jax.data.offline_pairs import log_files
from xpo_jax.data.pairs_log import content_hash, read_pairs
from xpo_jax.data.rows import DataError, Row
from xpo_jax.data.sources import read_rows
from xpo_jax.io.files import atomic_write, to_json
from xpo_jax.io.streams import print_json
from xpo_jax.models.hf import hub, model_folder

COLUMNS = ("prompt", "chosen", "rejected", "p_chosen")


def preference(record: Mapping[str, Any]) -> dict[str, Any] | str:
    """Return a record of the log as a row of a preference data set, or the reason why it is left out."""
    p = record["p_first"]
    if not record["weight"]:
        return "no verdict"
    if p == 0.5:
        return "ties"
    first, second = ([{"role": "assistant", "content": response["text"]}] for response in record["responses"])
    chosen, rejected = (first, second) if p > 0.5 else (second, first)
    return dict(zip(COLUMNS, (record["messages"], chosen, rejected, max(p, 1 - p)), strict=True))


def pair(row: Row, position: int, tokenizer: Any, end_token: int) -> dict[str, Any]:
    """Return a row of a preference data set as a record of the log.

    Args:
      position: the row's index in the data set; load_pairs reads the records in this order.
      end_token: appended to each response.

    Raises:
      DataError: a column that is missing or of the wrong type, with file and row.
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
        raise DataError(f"{row.at}: column 'p_chosen' must be a number from 0 to 1, got {p!r}")
    responses = []
    for name in ("chosen", "rejected"):
        response = validate.column(row, name)
        if isinstance(response, Sequence) and len(response) == 1 and isinstance(response[0], Mapping):
            response = response[0].get("content") if response[0].get("role") == "assistant" else None
        if not isinstance(response, str):
            raise DataError(
                f"{row.at}: column {name!r} must be text, or a list of one message with role assistant"
            )
        tokens = [*tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"], end_token]
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
    """Read, write and print; return the exit status."""
    parser = Parser(prog="python -m tools.pairs", description=__doc__, usage="see below")
    parser.add_argument("sources", nargs="+", help="pairs logs; with --model, preference data")
    parser.add_argument("--out", type=path_argument, required=True, help="the file to write")
    parser.add_argument("--model", help="make a pairs log, with this model's tokenizer")
    options = parser.parse_args(argv)
    counts: Counter[str] = Counter()
    written: list[Mapping[str, Any]] = []
    if options.model is None:
        for record in (record for file in log_files(options.sources) for record in read_pairs(file)):
            row = preference(record)
            if isinstance(row, str):
                counts[row] += 1
                continue
            counts["with an unfinished answer"] += not all(r["finished"] for r in record["responses"])
            written.append(row)
    else:
        folder = hub.find(options.model).folder
        tokenizer = model_folder.load_tokenizer(folder, model_folder.read_config(folder))
        end_token = model_folder.end_token_ids(folder, tokenizer)[0]
        written = [
            pair(row, position, tokenizer, end_token)
            for position, row in enumerate(read_rows(options.sources))
        ]
    if not written:
        raise ValueError(
            f"{', '.join(options.sources)}: no pair prefers one response; give a log with verdicts"
        )
    atomic_write(options.out, "".join(to_json(line) + "\n" for line in written))
    print_json({"out": str(options.out), "pairs": len(written), **counts})
    return 0


def main(argv: Sequence[str]) -> int:
    """Convert; return the exit status."""
    return exit_status("pairs", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
