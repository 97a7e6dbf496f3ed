"""Convert a pairs log to a preference data set that other trainers read, or such a data set to a pairs log.

    python -m tools.pairs LOG [LOG ...] --out=FILE.jsonl                  pairs.jsonl -> prompt, chosen, rejected
    python -m tools.pairs DATA [DATA ...] --model=MODEL --out=LOG.jsonl   the reverse

LOG is pairs.jsonl of a run, or a glob in quotes. FILE has one JSON object per line, in TRL's conversational format:
"prompt", a list of messages; "chosen" and "rejected", a list of one message each; and an additional column "p_chosen",
the judge's probability that chosen is better. Ties, pairs without a verdict, and pairs with an empty response or two
equal ones are left out.

DATA is such a file, or any source that config.data.train accepts; prompt, chosen and rejected may be plain text, and
chosen and rejected may be conversations that share the prompt (UltraFeedback and implicit prompts). An end token at the
end of a response is stripped. --on_bad_row, --on_extra_keys and --on_assistant_last are
those of config.data.
MODEL is a folder, owner/name on the hub, or "embedded"; its tokenizer tokenises the responses and appends an end token
to each. config.offline.pairs accepts the result, and DATA as well. Without a column p_chosen, the probability is 1.

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

from xpo_jax.data import preferences
from xpo_jax.data.offline_pairs import log_files
from xpo_jax.data.pairs_log import read_pairs
from xpo_jax.data.sources import read_rows
from xpo_jax.data.turns import Rules
from xpo_jax.io.files import atomic_write, to_json
from xpo_jax.io.streams import print_json
from xpo_jax.models.hf import hub, model_folder

from .cli import Parser, exit_status, path_argument


def preference(record: Mapping[str, Any]) -> dict[str, Any] | str:
    """Return a record of the log as a row of a preference data set, or the reason why it is left out."""
    p = record["p_first"]
    if not record["weight"]:
        return "no verdict"
    if p == 0.5:
        return "ties"
    first, second = ([{"role": "assistant", "content": response["text"]}] for response in record["responses"])
    if reason := preferences.drop_reason(first[0]["content"], second[0]["content"]):
        return reason
    chosen, rejected = (first, second) if p > 0.5 else (second, first)
    return dict(zip(preferences.COLUMNS, (record["messages"], chosen, rejected, max(p, 1 - p)), strict=True))


def run(argv: Sequence[str]) -> int:
    """Read, write and print; return the exit status."""
    usage = "python -m tools.pairs SOURCE [SOURCE ...] --out=FILE [--model=MODEL]"
    parser = Parser(prog="python -m tools.pairs", description=__doc__, usage=usage)
    parser.add_argument("sources", nargs="+", help="pairs logs; with --model, preference data")
    parser.add_argument("--out", type=path_argument, required=True, help="the file to write")
    parser.add_argument("--model", help="make a pairs log, with this model's tokenizer")
    for option, other in {**dict.fromkeys(Rules._fields, "drop"), "on_bad_row": "skip"}.items():
        parser.add_argument(
            f"--{option}", choices=("error", other), default="error", help=f"as config.data.{option}"
        )
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
        tokenize = preferences.ResponseTokenizer(tokenizer, model_folder.end_token_ids(folder, tokenizer))
        rules = Rules(options.on_extra_keys, options.on_assistant_last)
        records = (
            preferences.record(row, position, tokenize, counts, rules, options.on_bad_row)
            for position, row in enumerate(read_rows(options.sources))
        )
        written = [record for record in records if record is not None]
        if ties := sum(record["p_first"] == 0.5 for record in written):
            counts["ties"] = ties
    if len(written) == (counts["ties"] if options.model else 0):
        reasons = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(
            f"{', '.join(options.sources)}: no pair prefers one response{reasons and f' ({reasons})'}; give a log with"
            " verdicts, or preference data"
        )
    atomic_write(options.out, "".join(to_json(line) + "\n" for line in written))
    print_json({"out": str(options.out), "pairs": len(written), **counts})
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return exit_status("pairs", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
