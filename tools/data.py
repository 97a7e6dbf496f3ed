"""Check your data before a run: the prompts that a config makes of it, and the time and memory that reading takes.

    python -m tools.data --config=FILE[:ARGUMENT] [--config.FIELD=VALUE ...] [--show=3] [--batches=100]

Only the tokenizer is loaded. The tool prints the summaries of training and held-out prompts, as a run does at its
start; the first prompts as the model receives them; the seconds until the data are ready and until the first batch; the
batches per second after that; and the peak memory of the process before and after those batches. The last line is one
JSON object.

Examples:
  python -m tools.data --config=paraphrase
  python -m tools.data --config=my_config.py --config.data.train=large.jsonl --batches=1000

Exit status: 0 done, 2 invalid input (one line on stderr explains), 130 interrupted.

Left out on purpose: the judge's check of a prompt, which `python -m tools.judge` and the start of a run make.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence

from xpo_jax.algorithm.sampling import CandidateSampling
from xpo_jax.config import loader as configs
from xpo_jax.config import settings
from xpo_jax.data.prompts import load_prompts
from xpo_jax.io.streams import print_json
from xpo_jax.io.text import visible
from xpo_jax.models.hf import hub, model_folder
from xpo_jax.reporting.console import field_table, text_table

from .cli import Parser, exit_status


def peak_mib() -> int:
    """Return the peak resident memory of this process, MiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes per unit of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit >> 20


def run(argv: Sequence[str]) -> int:
    """Read and print; return the exit status."""
    parser = Parser(prog="python -m tools.data", description=__doc__)
    parser.add_argument("--show", type=int, default=3, help="prompts to print (3)")
    parser.add_argument("--batches", type=int, default=100, help="training batches to read (100)")
    options, rest = parser.parse_known_args(argv)
    if options.show < 0 or options.batches < 1:
        raise ValueError(f"--show={options.show} --batches={options.batches}: give at least 0 and at least 1")
    arguments = configs.split_argv(rest)
    config = configs.load(str(arguments.spec), arguments.overrides)
    top = configs.build(settings.Experiment, config, "config")
    sampling = configs.build(CandidateSampling, config.sampling, "sampling")
    folder = hub.find(configs.build(settings.Model, config.model, "model").path).folder
    tokenizer = model_folder.load_tokenizer(folder, model_folder.read_config(folder))

    start = time.monotonic()
    data = configs.build(
        load_prompts,
        config.data,
        "data",
        tokenizer=tokenizer,
        max_new_tokens=sampling.max_new_tokens,
        check=None,
    )
    batches = data.train_batches(top.batch_size, top.seed)
    ready, ready_mib = time.monotonic() - start, peak_mib()
    first = batches[0]
    first_batch = time.monotonic() - start
    print(field_table({"training": data.train.summary(), "held out": data.held_out.summary()}))
    shown = [
        [int(length), visible(tokenizer.decode(tokens[:length]))]
        for tokens, length, valid in zip(first.tokens, first.lengths, first.valid, strict=True)
        if valid
    ][: options.show]
    print(f"\n{text_table(['tokens', 'of the first batch'], shown)}\n" if shown else "")

    start, replaced = time.monotonic(), 0.0
    for step in range(options.batches):
        batches[step]
        replaced += batches.metrics(step).get("data/replaced_rows", 0)
    seconds = time.monotonic() - start
    report = {
        "rows": data.train.read,
        "seconds_until_ready": round(ready, 2),
        "seconds_until_first_batch": round(first_batch, 2),
        "batches": options.batches,
        "batches_per_second": round(options.batches / max(seconds, 1e-9), 1),
        "replaced_rows": int(replaced),
        "peak_mib_before": ready_mib,
        "peak_mib_after": peak_mib(),
    }
    print(field_table(report))
    print_json(report)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Check a config's data; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return exit_status("data", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
