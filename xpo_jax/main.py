"""The command line: `python -m xpo_jax.main --config=configs/paraphrase.py`, or `xpo --config=paraphrase`."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from xpo_jax.config import loader as configs
from xpo_jax.config import packaged
from xpo_jax.io import streams
from xpo_jax.io.text import error_line
from xpo_jax.runtime import user_code

HELP = """\
Steer a language model towards what a judge prefers, with Exploratory Preference Optimization.

  python -m xpo_jax.main --config=NAME[:ARGUMENT] [--config.FIELD=VALUE ...]
  python -m xpo_jax.main --config=FILE[:ARGUMENT] [--config.FIELD=VALUE ...]

Examples:
  python -m xpo_jax.main --config=paraphrase
  python -m xpo_jax.main --config=paraphrase --config.seed=1 --config.run_dir=runs/seed_1
  python -m xpo_jax.main --config=paraphrase --config.loss.alpha=0.0 --config.loss.second_candidate=policy
  python -m xpo_jax.main --config=my_config.py
  python -m xpo_jax.main --config=runs/paraphrase/config.json --config.run_dir=runs/again

Running the same command again resumes an interrupted run from its last checkpoint. Its config may differ in steps,
evaluation, logging, checkpoint, mesh, layout and limits; --accept-changes resumes it with any other change, too.
--profile writes a trace of two steps into the run directory's profile/, for TensorBoard or ui.perfetto.dev.

NAME is one of the packaged configs, whose comments document the fields. They are in {folder}:
{configs}
FILE is a config of your own, a Python file with get_config(argument), or the config.json of a run.
Progress goes to standard error. The last line on standard output is one JSON object with the result.

Exit status:
  0         done
  1         an error of the program, or of code of yours (the traceback shows where); what was learned is saved
  2         invalid input or configuration, devices that cannot be used, device memory that does not suffice, or a run
            that learns nothing or diverges (one line on standard error explains)
  124       stuck (see max_step_seconds)
  129, 130, 143
            interrupted by SIGHUP, SIGINT or SIGTERM; the current step is saved"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one experiment and return the exit status, which does not depend on whether its output can be written."""
    with streams.protected():
        return _main(sys.argv[1:] if argv is None else argv)


def help_text() -> str:
    """Return the help with the packaged configs, and with the command as it was called."""
    listed = "\n".join(f"  {name:12} {summary}" for name, summary in packaged.summaries().items())
    text = HELP.format(folder=packaged.folder(), configs=listed)
    return text.replace("python -m xpo_jax.main", "xpo") if Path(sys.argv[0]).name == "xpo" else text


def _main(argv: Sequence[str]) -> int:
    try:
        arguments = configs.split_argv(argv)
        if arguments.help or arguments.spec is None:
            print(help_text())
            return 0
        config = configs.load(arguments.spec, arguments.overrides)
    except ValueError as error:
        return _refused(error)
    except SystemExit as error:
        return _refused(RuntimeError(user_code.exit_line(error)))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or it warns that torch is missing
    # imported here, so that --help and a wrong config need no JAX
    from xpo_jax.config import settings
    from xpo_jax.offline import learn
    from xpo_jax.runtime import backend, collectives, compilation, distributed
    from xpo_jax.runtime.interruption import Stopped
    from xpo_jax.train import train

    try:
        compilation.enable_cache(os.environ)
        configs.check(settings.Experiment, config, "config")
        configs.build(distributed.start, config.distributed, "distributed")
        run = train if config.offline is None else learn
        streams.print_json(run(config, accept_changes=arguments.accept_changes))
    except collectives.Failed as error:
        return _refused(error)  # every process raised it, and exits in the same way
    except (ValueError, FloatingPointError, OSError) as error:
        return distributed.leave(_refused(error))
    except Stopped as stopped:
        print(f"xpo_jax: {stopped}", file=sys.stderr)
        return stopped.status if stopped.on_all_processes else distributed.leave(stopped.status)
    except KeyboardInterrupt:
        print("xpo_jax: interrupted", file=sys.stderr)
        return distributed.leave(130)
    except SystemExit as error:  # its status could claim a result
        return distributed.leave(_refused(RuntimeError(user_code.exit_line(error))))
    except Warning as warning:
        remedy = "; PYTHONWARNINGS, -W or warnings.simplefilter turns warnings into errors: let it not"
        return distributed.leave(_refused(RuntimeError(error_line(warning, with_class=True) + remedy)))
    except Exception as error:
        latest = compilation.Program.latest
        line = backend.out_of_memory(error, f"running; the last program was {latest!r}", latest)
        if line is not None:
            return distributed.leave(_refused(backend.BackendError(line)))
        if not distributed.is_running():
            raise
        traceback.print_exc()
        print(
            "xpo_jax: if this is about a connection, another process ended before; see its output",
            file=sys.stderr,
        )
        return distributed.leave(1)
    return 0


def _refused(error: Exception) -> int:
    print(f"xpo_jax: {error_line(error)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
