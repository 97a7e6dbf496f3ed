"""XPO on a bandit, where everything is known: the optimum, its value, and how far the policy is from it.

There is one prompt and a response is an arm. The policy is a softmax over arms that starts as the reference; loss
and optimizer are those of a training run. A round draws pairs (policy, reference), asks a Bradley-Terry judge, adds
them to all pairs so far, and takes a few steps on the loss over all of them: Algorithm 1 of arXiv 2405.21046 with
its argmin replaced by gradient steps. Since pairs are counted by arms, a step costs the same however many there are.

Left out: prompts, sequences, shared parameters (a network moves answers together, a softmax over arms does not), and
a judge that errs otherwise than Bradley-Terry's.
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
    """reference f32[K], probabilities; rewards f32[K]; beta f32[], of the objective. K arms."""

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
    """5 common arms with rewards 0.5 to 1 and 8 rare ones, of which one is best.

    Args:
      mass: the reference's probability of each rare arm; the common ones share the rest equally.
      beta: strength of the pull towards the reference.
      best: "common" gives the reward of 3 to a common arm, and nothing to all rare ones.
      junk: further rare arms with reward 0.
      uniform: all arms have the same probability instead.
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
    """J(pi) = E_pi[reward] - beta KL(pi, reference), of a policy's log-probabilities f32[K]."""
    return jnp.sum(jnp.exp(logps) * (bandit.rewards - bandit.beta * (logps - jnp.log(bandit.reference))))


def optimum(bandit: Bandit) -> Array:
    """The log-probabilities of the policy with the largest value, reference * exp(reward / beta), normalised."""
    return jax.nn.log_softmax(jnp.log(bandit.reference) + bandit.rewards / bandit.beta)


# ---- the learner ------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One run. Numbers are arrays of no dimension, so that runs can be stacked.

    The temperature is that of sampling, from policy and reference alike. Unlike in a training run loss and value do
    not know of it: they are those of temperature 1, so that all settings are after the same optimum.
    """

    bandit: Bandit
    alpha: Array  # f32[]
    temperature: Array  # f32[]
    on_policy: Array  # bool[], both candidates are the policy's
    seed: Array  # i32[]


class Learner(NamedTuple):
    """What a run carries from round to round."""

    params: dict[str, Array]  # logits f32[K]
    opt_state: Any
    counts: Array  # f32[K K], pairs by their arms, (policy's, reference's)
    wins: Array  # f32[K K], of the policy's arm; a tie is half a win
    queries: Array  # i32[], verdicts asked for


class Curve(NamedTuple):
    """After each round: value f32[rounds]; queries i32[rounds], verdicts asked for since the start."""

    value: Array
    queries: Array


def loss(params: dict[str, Array], run: Run, counts: Array, wins: Array) -> Array:
    """The XPO loss over all pairs so far; pairs of the same two arms are one with their share of wins as verdict."""
    arms = len(run.bandit.reference)
    first, second = (x.ravel() for x in np.indices((arms, arms)))
    both = lambda logps: jnp.stack([logps[first], logps[second]])  # noqa: E731
    terms = losses.Sigmoid(bonus_clip=CLIP)(
        both(jax.nn.log_softmax(params["logits"])),
        both(jnp.log(run.bandit.reference)),
        (wins / jnp.maximum(counts, 1)).ravel(),
        beta=run.bandit.beta,
        alpha=run.alpha,
    )
    return losses.total(terms, counts.ravel(), counts.sum())


def adam(learning_rate: float) -> optax.GradientTransformation:
    """The optimizer of the embedded default, at a constant rate: nobody knows beforehand when a run is done."""
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
        steps=1,  # of a constant rate it changes nothing
    )[0]


def start(optimizer: optax.GradientTransformation, run: Run) -> Learner:
    """The policy is the reference, and no pair is known."""
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
) -> tuple[Learner, tuple[Array, Array]]:
    """One round: draw `pairs` pairs, ask the judge, take `updates` steps.

    Identical arms tie without being asked, as identical answers do in a training run. Random numbers depend on the
    seed and the round alone, so that runs of one seed differ in nothing but their setting.
    """
    arms = len(run.bandit.reference)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(run.seed), index), 3)
    reference, policy = jnp.log(run.bandit.reference), learner.params["logits"]
    draw = lambda key, logits: jax.random.categorical(key, logits / run.temperature, shape=(pairs,))  # noqa: E731
    first, second = draw(keys[0], policy), draw(keys[1], jnp.where(run.on_policy, policy, reference))
    asked = first != second
    p = jax.nn.sigmoid(run.bandit.rewards[first] - run.bandit.rewards[second])
    won = jnp.where(asked, jax.random.uniform(keys[2], (pairs,)) < p, 0.5)
    hot = lambda x: jax.nn.one_hot(x, arms)  # noqa: E731
    counts = learner.counts + hot(first).T @ hot(second)
    wins = learner.wins + (hot(first) * won[:, None]).T @ hot(second)

    def update(_: int, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        params, opt_state = carry
        grads = jax.grad(loss)(params, run, counts, wins)
        changes, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, changes), opt_state

    params, opt_state = jax.lax.fori_loop(0, updates, update, (learner.params, learner.opt_state))
    learner = Learner(params, opt_state, counts, wins, learner.queries + asked.sum())
    return learner, (value(run.bandit, jax.nn.log_softmax(params["logits"])), learner.queries)


def simulate(
    runs: Sequence[Run],
    optimizer: optax.GradientTransformation,
    *,
    pairs: int,
    updates: int,
    rounds: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Curve:
    """All runs at once, as one vmapped scan.

    Args:
      runs: with equally many arms.
      pairs, updates: per round; see `play`.
      rounds: a multiple of 64, which are compiled as one scan.
      progress: wraps the loop over these scans.

    Returns:
      value f32[runs rounds] and queries i32[runs rounds], as NumPy arrays.

    Raises:
      ValueError: a number of rounds that is no multiple of 64.
    """
    if rounds <= 0 or rounds % CHUNK:
        raise ValueError(f"rounds is {rounds}; a multiple of {CHUNK} is expected")

    @jax.jit
    def chunk(runs: Run, learners: Learner, begin: Array) -> tuple[Learner, tuple[Array, Array]]:
        def one(run: Run, learner: Learner) -> tuple[Learner, tuple[Array, Array]]:
            step = functools.partial(play, optimizer, pairs, updates, run)
            return jax.lax.scan(step, learner, begin + jnp.arange(CHUNK))

        return jax.vmap(one)(runs, learners)

    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)
    learners = jax.vmap(functools.partial(start, optimizer))(together)
    parts = []
    for begin in progress(range(0, rounds, CHUNK)):
        learners, part = chunk(together, learners, jnp.int32(begin))
        parts.append(jax.device_get(part))
    return Curve(*(np.concatenate(list(x), axis=1) for x in zip(*parts, strict=True)))


# ---- what a curve says ------------------------------------------------------------------------------


def ends(bandit: Bandit) -> tuple[float, float]:
    """The values of the reference and of the optimum."""
    return float(value(bandit, jnp.log(bandit.reference))), float(value(bandit, optimum(bandit)))


def share(bandit: Bandit, curve: Curve) -> np.ndarray:
    """How much of the way from the reference's value to the optimum's was gone, f64[runs rounds]."""
    low, high = ends(bandit)
    return (np.float64(curve.value) - low) / (high - low)


def regret(bandit: Bandit, curve: Curve) -> np.ndarray:
    """f64[runs], the sum over verdicts of how far below the optimum the policy was that drew the pair."""
    low, high = ends(bandit)
    before = np.concatenate([np.full((len(curve.value), 1), low), curve.value[:, :-1]], axis=1)
    return ((high - before) * np.diff(curve.queries, axis=1, prepend=0)).sum(axis=1)
