"""What people do to a run: close its console, edit its data, edit objects in code of their own. See cases.py."""

from __future__ import annotations

import shutil

from tools.faults.cases import case, expect, of_all_judgements, same, same_again
from tools.faults.checkpoint_cases import contents
from tools.faults.config_cases import recorded
from tools.faults.plans import Plan, struck
from tools.faults.tiny_run import ROOT, Ended, Runs

PROMPTS = ROOT / "xpo_jax" / "embedded" / "prompts"

# ---- consoles ------------------------------------------------------------------------------------------


def _result_is_shown(ended: Ended) -> bool:
    return '"run_dir"' in ended.out


@case("console closed")
def _(runs: Runs, name: str) -> str:
    """Start without standard output and error, as `>&- 2>&-` does."""
    ended = runs.run(name, within=("sh", "-c", 'exec "$@" >&- 2>&-', "sh"))
    struck(not ended.out and not ended.err, f"something was printed: {(ended.out + ended.err)[:200]!r}")
    return f"{expect(ended, 0, '')}, nothing printed; {same(runs, name)}"


@case("console gone while sampling")
def _(runs: Runs, name: str) -> str:
    """Let nobody read the output from the third step on."""
    ended = runs.run(name, (), Plan(at="program sample", step=3, do="gone"))
    struck(not _result_is_shown(ended), f"the result is shown: {ended.out[-200:]!r}")
    return f"{expect(ended, 0, '')}, without the last lines; {same(runs, name)}"


@case("SIGHUP that is ignored")
def _(runs: Runs, name: str) -> str:
    """Send it to a run under nohup, which finishes."""
    ended = runs.run(name, (), Plan(at="program sample", step=3, do="SIGHUP"), within=("nohup",))
    return f"{expect(ended, 0, '')}; {same(runs, name)}"


# ---- data and objects ----------------------------------------------------------------------------------


@case("input changed")
def _(runs: Runs, name: str) -> str:
    """Edit the data between two commands: refused, unless that is accepted; put back, the run resumes."""
    train, held_out = (runs.folder / f"{name}-{file}.jsonl" for file in ("train", "held_out"))
    for file in (train, held_out):
        shutil.copyfile(PROMPTS / file.name.removeprefix(f"{name}-"), file)
    fields = [f"data.train={train}", f"data.held_out={held_out}"]
    expect(runs.run(name, [*fields, "steps=3"]), 0, "")
    original, before = train.read_bytes(), contents(runs.path(name))
    train.write_bytes(original.replace(b"Rechnung", b"Quittung"))
    struck(train.read_bytes() != original, f"{train} is what it was")
    accepted = runs.copy(name, f"{name}-accepted")
    message = r"data\.train: its content is another one, fingerprint \w+ there, \w+ here.*--accept-changes"
    outcome = expect(runs.run(name, fields), 2, message)
    assert contents(runs.path(name)) == before, "the directory was changed"
    outcome += (
        f"; with --accept-changes: {expect(runs.run(accepted.name, [*fields, '--accept-changes']), 0, '')}"
    )
    fingerprints = [recorded(run, "inputs.json")["data.train"] for run in (runs.path(name), accepted)]
    assert fingerprints[0] != fingerprints[1], "the edited data has the same fingerprint"
    train.write_bytes(original)
    return f"{outcome.replace(str(runs.path(name)), name)}; put back: {same_again(runs, name, fields)}"


@case("judge edits what it is given")
def _(runs: Runs, name: str) -> str:
    """Spoil messages and rows in place, and empty the list of comparisons, after every judgement."""
    ended = runs.run(name, (), of_all_judgements("edit"))
    return f"{expect(ended, 0, '')}; {same(runs, name)}"
