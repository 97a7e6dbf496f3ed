"""Make the judges that a config names, and the limits on their use."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from xpo_jax.config import loader as configs
from xpo_jax.config import settings
from xpo_jax.config.evaluation import Evaluation
from xpo_jax.config.loss import Loss
from xpo_jax.evaluation.evaluator import POLICY_SAMPLES
from xpo_jax.experiment.data_setup import Data
from xpo_jax.judges import JUDGES, ask
from xpo_jax.judges.contract import (
    DeviceJudge,
    HasOneProcess,
    HasProbe,
    HasScores,
    Judge,
    is_collective,
    queries_per_comparison,
)
from xpo_jax.judges.limits import Budget, FailureTolerance
from xpo_jax.runtime import distributed
from xpo_jax.runtime.user_code import surroundings_restored


def make_judge(group: Mapping[str, Any] | ConfigDict, where: str) -> Any:
    """Return the judge that a config's group names; a judge that is made of others makes them with this, too.

    The name is that of a factory (a class, or a function that returns the judge), whose arguments are the group's
    fields. A function whose only parameter is called `comparisons` is the judge itself, and so is a functools.partial
    that leaves only this parameter, or an object that is called so.

    Args:
      group: the judge's group of the config.
      where: its path in the config, for errors.

    Raises:
      ValueError: an unknown name, a field that does not fit, anything that the judge's factory refuses, an object
        that cannot be called as judge(comparisons).
    """
    judge = factory = configs.resolve(group["name"], f"{where}.name", JUDGES)
    if inspect.isfunction(factory) and _is_neither(factory, group):
        raise ValueError(
            f"{where}.name: {group['name']}{inspect.signature(factory)} is neither a judge, a function whose only"
            " parameter is called comparisons, nor a factory, whose arguments are the group's fields; see"
            " docs/judges.md"
        )
    if _is_judge(factory):
        configs.check(lambda: None, group, where)
    else:
        injected = {
            "rule_judge": JUDGES["paraphrase"],
            "make_judge": make_judge,
            "call_by_shares": ask.call_by_shares,
        }
        with surroundings_restored():
            judge = configs.build(factory, group, where, **injected)
    try:
        inspect.signature(judge).bind([])
    except (TypeError, ValueError):
        raise ValueError(
            f"{where}.name: {group['name']} gives a {type(judge).__name__} that cannot be called as"
            " judge(comparisons); see docs/judges.md"
        ) from None
    return judge


def _is_judge(named: Callable[..., Any]) -> bool:
    """Return whether what a config names is the judge itself rather than its factory."""
    if inspect.isclass(named):
        return False
    bound = named.keywords if isinstance(named, functools.partial) else {}
    try:
        parameters = inspect.signature(named).parameters
    except ValueError:  # some builtins have no signature
        return False
    return [name for name in parameters if name not in bound] == ["comparisons"]


def _is_neither(function: Callable[..., Any], group: Mapping[str, Any] | ConfigDict) -> bool:
    """Return whether a function requires positional arguments none of which the group has: a misspelt judge."""
    parameters = inspect.signature(function).parameters
    required = [
        name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty
    ]
    return bool(required) and required != ["comparisons"] and not any(name in group for name in required)


class Judges(NamedTuple):
    """The judges of training and of evaluations, which may be one."""

    training: Judge
    evaluation: Judge

    def probe(self) -> None:
        """Check that both are available and that this run suits them, before anything is downloaded or loaded."""
        for where, judge in {"judge": self.training, "evaluation.judge": self.evaluation}.items():
            if where != "judge" and judge is self.training:
                continue
            if isinstance(judge, HasOneProcess) and judge.one_process and distributed.is_running():
                raise ValueError(
                    f"{where}: this judge needs a run of one process; start one alone, with distributed.mode = 'off'"
                )
            if isinstance(judge, HasProbe):
                judge.probe()


def make_judges(group: ConfigDict, evaluation: Evaluation) -> Judges:
    """Make the run's judge, and that of evaluations if the config names another one.

    Raises:
      ValueError: as `make_judge`; or a judge of evaluations that runs on the devices.
    """
    judge: Judge = make_judge(group, "judge")
    if evaluation.judge is None:
        return Judges(judge, judge)
    other: Judge = make_judge(evaluation.judge, "evaluation.judge")
    if isinstance(other, DeviceJudge) and is_collective(
        other
    ):  # a combination of others has the methods as well
        raise ValueError(
            f"evaluation.judge.name: {evaluation.judge['name']} runs on the devices, which only the run's own judge"
            " may; name one that does not, or None"
        )
    return Judges(judge, other)


def check_judge(judge: Judge, judging: settings.Judging, loss: Loss, *, offline: bool, renewed: bool) -> None:
    """Raise ValueError where the judge of training does not suit how the run uses it.

    Args:
      renewed: whether `model.reference_every_steps` is set.
    """
    check_pairing(loss, judge, both_orders=judging.both_orders, offline=offline)
    for bad, why in (
        (offline, "offline names recorded pairs, and no judge is asked"),
        (is_collective(judge), "this judge runs on the devices, which an update needs"),
        (
            loss.pairing is not None,
            f"loss.pairing is {loss.pairing!r}, which needs the present policy or judge",
        ),
        (renewed, "model.reference_every_steps copies the policy, which is not known early"),
    ):
        if judging.steps_behind and bad:
            raise ValueError(f"judging.steps_behind is 1, but {why}; set it to 0")


def check_pairing(loss: Loss, judge: Judge, *, both_orders: bool, offline: bool) -> None:
    """Raise ValueError where the rule that pairs candidates does not suit the run."""
    if loss.pairing is None:
        return
    if offline:
        raise ValueError(
            f"loss.candidates is {loss.candidates}, but offline names recorded pairs, and nothing is sampled; set it to"
            " 1, and loss.pairing to None"
        )
    if loss.scores_answers and not isinstance(judge, HasScores):
        raise ValueError(
            f"loss.pairing: {loss.pairing!r} needs a judge that scores every answer by itself, with the methods scores"
            " and compare_scores (paraphrase, reward_model, reward_function); choose 'uncertain' or 'optimistic'"
        )
    if loss.scores_answers and both_orders:
        raise ValueError(
            f"judging.both_orders is True, but with loss.pairing={loss.pairing!r} every answer is scored by itself, in"
            " no order; set it to False"
        )


class Judging(NamedTuple):
    """The judges of training and of evaluations, the queries that the run may make, and the failures it tolerates."""

    judge: Judge
    evaluation_judge: Judge
    budget: Budget
    failure_tolerance: FailureTolerance

    @property
    def evaluates_too(self) -> bool:
        """Whether the judge of training is asked in evaluations, too."""
        return self.evaluation_judge is self.judge

    def spent(self, queries: int, evaluation_queries: int) -> int:
        """Return the queries that count towards the budget, from those of training and of evaluations."""
        return queries + (evaluation_queries if self.evaluates_too else 0)


def make_judging(
    judges: Judges,
    judging: settings.Judging,
    evaluation: Evaluation,
    data: Data,
    loss: Loss,
    *,
    offline: bool,
) -> Judging:
    """Build the limits on the judges.

    Raises:
      ValueError: the queries do not suffice for a step.
    """
    opponents = evaluation.reference_samples + (data.answers is not None)
    comparisons = sum(int(batch.valid.sum()) for batch in data.held_out) * POLICY_SAMPLES * opponents
    per_comparison = (1 + judging.both_orders) * queries_per_comparison(judges.training)
    budget = Budget(
        judging.max_queries,
        queries_per_prompt=loss.queries_per_prompt(per_comparison),
        queries_per_comparison=per_comparison,
        comparisons_per_evaluation=comparisons if judges.evaluation is judges.training else 0,
        every_steps=evaluation.every_steps,
    )
    budget.check(0 if offline else int(data.batches[0].valid.sum()))
    return Judging(*judges, budget, FailureTolerance(**judging.failure_tolerance))
