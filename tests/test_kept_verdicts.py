"""Every verdict that was paid for is kept, for any number of processes in each start and a kill at any point."""

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from xpo_jax.data.pairs_log import PairsLog, content_hash, read_pairs
from xpo_jax.experiment.resume import Restored, Status
from xpo_jax.experiment.verdict_journal import JOURNAL, Journal, cut_pairs
from xpo_jax.values import Prompts

B, STEPS = 4, 6
MESSAGES = tuple([{"role": "user", "content": f"question {i}"}] for i in range(B))


class Start(NamedTuple):
    """One start of the run.

    processes: how many there are.
    steps: until it is killed. every: steps between two checkpoints.
    written: how many of the processes have written their pairs of the step in which the run is killed.
    """

    processes: int
    steps: int
    every: int
    written: int


STARTS = st.builds(
    Start, st.integers(1, 4), st.integers(0, STEPS), st.integers(1, 3), written=st.integers(0, 4)
)


def record(step, i):
    return {
        "step": step,
        "position": i,
        "hash": content_hash(MESSAGES[i], {}, f"a{step}", "b"),
        "row": {},
        "messages": MESSAGES[i],
        "responses": [{"tokens": [1], "text": text, "finished": True} for text in (f"a{step}", "b")],
        "shown": [0, 1],
        "flipped": None,
        "p_first": 1.0,
        "weight": 1.0,
        "reason": "",
        "scores": {},
        "failure": None,
    }


class Run:
    """A run without a model: what it saves, what it logs, and which verdicts it has paid for."""

    def __init__(self, path: Path):
        self.path, self.restored, self.paid = path, Restored(), []

    def start(self, processes: int, steps: int, every: int, written: int) -> None:
        """Restore, and run `steps` steps with a checkpoint after every `every`th; then be killed within the next."""
        restored = self.restored
        done = restored.step or 0
        cut_pairs(self.path, done, restored.offsets)
        journal = Journal(self.path)
        logs = [
            PairsLog(self.path / ("pairs.jsonl" if n == 0 else f"pairs-{n}.jsonl")) for n in range(processes)
        ]
        end = min(done + steps, STEPS)
        for step in range(done, end):
            self.judge(step, journal, logs)
            if (step + 1) % every == 0 or step + 1 == STEPS:
                offsets = restored.offsets_after({log.path.name: log.offset for log in logs})
                self.restored = Restored(step + 1, Status({}, (), offsets))
        if end < STEPS:
            self.judge(end, journal, logs, written)
        for log in logs:
            log.close()

    def judge(self, step, journal, logs, written=B):
        """Judge a step and log its pairs; of the first `written` processes only."""
        texts = [f"a{step}"] * B, ["b"] * B
        for n, log in enumerate(logs[:written]):
            local = np.zeros(B, bool)
            local[B * n // len(logs) : B * (n + 1) // len(logs)] = True
            prompts = Prompts(({},) * B, MESSAGES, None, None, np.arange(B), local)
            known = journal.recorded_verdicts(step, prompts, *texts)
            self.paid += [(step, int(i)) for i in np.flatnonzero(local) if i not in known]
            log.append([record(step, int(i)) for i in np.flatnonzero(local)])

    def recorded(self):
        """Return step and position of every verdict on disk."""
        files = [*self.path.glob("pairs*.jsonl"), *self.path.glob(JOURNAL)]
        return {(pair["step"], pair["position"]) for file in files for pair in read_pairs(file)}


@settings(deadline=None, max_examples=60)
@given(st.lists(STARTS, min_size=1, max_size=5), st.integers(1, 4))
def test_verdicts_of_any_sequence_of_process_counts_are_kept_and_paid_once(starts, processes):
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        for start in [*starts, Start(processes, STEPS, 2, 0)]:
            run.start(*start)
            assert set(run.paid) <= run.recorded()
        assert sorted(run.paid) == [(step, i) for step in range(STEPS) for i in range(B)]  # each of them once
        logged = [
            (pair["step"], pair["position"])
            for file in Path(folder).glob("pairs*.jsonl")
            for pair in read_pairs(file)
        ]
        assert sorted(logged) == sorted(run.paid)
