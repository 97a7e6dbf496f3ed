"""XPO on a bandit, where everything is known: the optimum, its value, and how far the policy is from it.

There is one prompt and a response is an arm. The policy is a softmax over arms that starts as the reference; loss
and optimizer are those of a training run. A round draws pairs (policy, reference), asks a Bradley-Terry judge, adds
them to all earlier pairs, and takes a few steps on the loss over all of them: Algorithm 1 of arXiv 2405.21046 with
its argmin replaced by gradient steps. Since pairs are counted by arms, a step costs the same however many there are.

Left out on purpose: prompts, sequences, shared parameters (a network moves similar answers at once, a softmax over
arms does not), and judges with errors other than those of the Bradley-Terry model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xpo_jax.algorithm import losses
from xpo_jax.algorithm.optimizer import make_optimizer
from xpo_jax.values import Array

COMMON, RARE = 5, 8
GOOD = 3.0  # the reward of the best arm; common arms have 0.5 to 1, the other rare ones 0
CLIP = 500.0  # of the bonus, as in the configs
CHUNK = 64  # rounds

# ---- the bandit -------------------------------------------------------------------------------------


class Bandit(NamedTuple):
    """A bandit of K arms: reference f32[K], probabilities; rewards f32[K]; beta f32[] of the objective."""

    reference: Array
    rewards: Array
    beta: Array


def make_bandit(
    mass: float,
    *,
    beta: float,
    best: Literal["rare", "common"] = "rare",
    junk: int = 0,
    uniform: bool = False,
) -> Bandit:
    """Return a bandit with 5 common arms with rewards 0.5 to 1 and 8 rare ones, one of which is the best.

    Args:
      mass: the reference's probability of each rare arm; the rest is divided equally among the common ones.
      beta: coefficient of the KL term.
      best: "common" gives the reward of 3 to a common arm and 0 to all rare ones.
      junk: number of further rare arms with reward 0.
      uniform: give all arms the same probability instead.
    """
    rare = RARE + junk
    reference = np.full(COMMON + rare, mass, np.float64)
    reference[:COMMON] = (1 - rare * mass) / COMMON
    if uniform:
        reference[:] = 1 / len(reference)
    rewards = np.zeros(len(reference))
    rewards[:COMMON] = np.linspace(0.5, 1, COMMON)
    rewards[{"rare": COMMON, "common": COMMON - 1}[best]] = GOOD
    return Bandit(jnp.float32(reference), jnp.float32(rewards), jnp.float32(beta))


def value(bandit: Bandit, logps: Array) -> Array:
    """Return J(pi) = E_pi[reward] - beta KL(pi, reference) of a policy with log-probabilities f32[K]."""
    return jnp.sum(jnp.exp(logps) * (bandit.rewards - bandit.beta * (logps - jnp.log(bandit.reference))))


def optimum(bandit: Bandit) -> Array:
    """Return the log-probabilities f32[K] of the optimal policy, reference * exp(reward / beta), normalised."""
    return jax.nn.log_softmax(jnp.log(bandit.reference) + bandit.rewards / bandit.beta)


# ---- the learner ------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One run. Numbers are scalar arrays, so that runs can be stacked.

    Temperatures apply to sampling from policy and reference. Unlike in a training run, they do not apply to loss and
    value, so that all settings have the same optimum.
    """

    bandit: Bandit
    alpha: Array  # f32[], in the first round
    temperature: Array  # f32[], of the first candidate
    second_temperature: Array  # f32[], of the second one
    on_policy: Array  # bool[]: the policy samples both candidates
    fading: Array  # f32[]: the round at which alpha, falling linearly, reaches 0; inf: constant
    fresh: Array  # bool[]: updates see the round's own pairs alone
    seed: Array  # i32[]


class Learner(NamedTuple):
    """The state of a run between rounds."""

    params: dict[str, Array]  # logits f32[K]
    opt_state: Any
    counts: Array  # f32[K K], number of pairs by their arms (first, second candidate)
    wins: Array  # f32[K K], wins of the first candidate's arm; a tie is half a win
    queries: Array  # i32[], verdicts so far


class Curve(NamedTuple):
    """After each round: value f32[rounds]; queries i32[rounds], verdicts since the start."""

    value: Array
    queries: Array


XPO = losses.Sigmoid(bonus_clip=CLIP)


def loss(
    params: dict[str, Array],
    run: Run,
    counts: Array,
    wins: Array,
    *,
    of_pairs: losses.LossFn = XPO,
    index: Array | int = 0,
) -> Array:
    """Return the loss over pairs; those of the same two arms count as one, with their win rate as verdict.

    Args:
      counts, wins: f32[K K], see `Learner`. of_pairs: the loss of single pairs. index: of the round, for alpha.
    """
    arms = len(run.bandit.reference)
    first, second = (x.ravel() for x in np.indices((arms, arms)))

    def pair_logps(logps: Array) -> Array:
        return jnp.stack([logps[first], logps[second]])

    terms = of_pairs(
        pair_logps(jax.nn.log_softmax(params["logits"])),
        pair_logps(jnp.log(run.bandit.reference)),
        (wins / jnp.maximum(counts, 1)).ravel(),
        beta=run.bandit.beta,
        alpha=run.alpha * jnp.maximum(1 - index / run.fading, 0),
    )
    return losses.total(terms, counts.ravel(), counts.sum())


def adam(learning_rate: float) -> optax.GradientTransformation:
    """Return the embedded default's optimizer at a constant rate, because no run has a fixed length."""
    return make_optimizer(
        name="adamw",
        learning_rate=learning_rate,
        schedule="constant",
        warmup_steps=0,
        b1=0.9,
        b2=0.99,
        eps=1e-8,
        mu_dtype="float32",
        weight_decay=0.0,
        clip_norm=1.0,
        steps=1,  # without effect at a constant rate
    )[0]


def start(optimizer: optax.GradientTransformation, run: Run) -> Learner:
    """Return the initial state: the policy is the reference, and there are no pairs."""
    params = {"logits": jnp.log(run.bandit.reference)}
    arms = len(run.bandit.reference)
    none = jnp.zeros((arms, arms))
    return Learner(params, optimizer.init(params), none, none, jnp.int32(0))


def play(
    optimizer: optax.GradientTransformation,
    pairs: int,
    updates: int,
    run: Run,
    learner: Learner,
    index: Array,
    *,
    of_pairs: losses.LossFn = XPO,
) -> tuple[Learner, tuple[Array, Array]]:
    """Play one round: draw `pairs` pairs, ask the judge, take `updates` steps.

    Identical arms tie without a query, like identical answers in a training run. Random numbers depend only on the
    seed and the round, so that runs of one seed differ only in their setting.
    """
    arms = len(run.bandit.reference)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(run.seed), index), 3)
    reference, policy = jnp.log(run.bandit.reference), learner.params["logits"]

    def draw(key: Array, logits: Array, temperature: Array) -> Array:
        return jax.random.categorical(key, logits / temperature, shape=(pairs,))

    first = draw(keys[0], policy, run.temperature)
    second = draw(keys[1], jnp.where(run.on_policy, policy, reference), run.second_temperature)
    judged = first != second
    p = jax.nn.sigmoid(run.bandit.rewards[first] - run.bandit.rewards[second])
    won = jnp.where(judged, jax.random.uniform(keys[2], (pairs,)) < p, 0.5)
    policy_arms, reference_arms = jax.nn.one_hot(first, arms), jax.nn.one_hot(second, arms)
    past = jnp.where(run.fresh, 0.0, 1.0)
    counts = past * learner.counts + policy_arms.T @ reference_arms
    wins = past * learner.wins + (policy_arms * won[:, None]).T @ reference_arms

    def update(_: int, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        params, opt_state = carry
        grads = jax.grad(loss)(params, run, counts, wins, of_pairs=of_pairs, index=index)
        changes, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, changes), opt_state

    params, opt_state = jax.lax.fori_loop(0, updates, update, (learner.params, learner.opt_state))
    learner = Learner(params, opt_state, counts, wins, learner.queries + judged.sum())
    return learner, (value(run.bandit, jax.nn.log_softmax(params["logits"])), learner.queries)


def simulate(
    runs: Sequence[Run],
    optimizer: optax.GradientTransformation,
    *,
    pairs: int,
    updates: int,
    rounds: int,
    of_pairs: losses.LossFn = XPO,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Curve:
    """Simulate all runs at once, as one vmapped scan.

    Args:
      runs: with the same number of arms.
      pairs, updates: per round; see `play`.
      rounds: a multiple of 64, the length of the compiled scan.
      of_pairs: the loss of single pairs.
      progress: wraps the loop over these scans.

    Returns:
      value f32[runs rounds] and queries i32[runs rounds], as NumPy arrays.

    Raises:
      ValueError: rounds is not a multiple of 64.
    """
    if rounds <= 0 or rounds % CHUNK:
        raise ValueError(f"rounds is {rounds}, must be a positive multiple of {CHUNK}")

    @jax.jit
    def chunk(runs: Run, learners: Learner, begin: Array) -> tuple[Learner, tuple[Array, Array]]:
        def one(run: Run, learner: Learner) -> tuple[Learner, tuple[Array, Array]]:
            step = functools.partial(play, optimizer, pairs, updates, run, of_pairs=of_pairs)
            return jax.lax.scan(step, learner, begin + jnp.arange(CHUNK))

        return jax.vmap(one)(runs, learners)

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)
    learners = jax.vmap(functools.partial(start, optimizer))(stacked)
    parts = []
    for begin in progress(range(0, rounds, CHUNK)):
        learners, part = chunk(stacked, learners, jnp.int32(begin))
        parts.append(jax.device_get(part))
    return Curve(*(np.concatenate(list(x), axis=1) for x in zip(*parts, strict=True)))


# ---- figures of a curve ------------------------------------------------------------------------------


def ends(bandit: Bandit) -> tuple[float, float]:
    """Return the values of the reference and of the optimum."""
    return float(value(bandit, jnp.log(bandit.reference))), float(value(bandit, optimum(bandit)))


def progress_to_optimum(bandit: Bandit, curve: Curve) -> np.ndarray:
    """Return f64[runs rounds], the fraction of the way from the reference's value to the optimum's."""
    low, high = ends(bandit)
    return (np.float64(curve.value) - low) / (high - low)


def regret(bandit: Bandit, curve: Curve) -> np.ndarray:
    """Return f64[runs], the sum over verdicts of how far the policy that drew the pair was below the optimum."""
    low, high = ends(bandit)
    before = np.concatenate([np.full((len(curve.value), 1), low), curve.value[:, :-1]], axis=1)
    return ((high - before) * np.diff(curve.queries, axis=1, prepend=0)).sum(axis=1)
