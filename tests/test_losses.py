"""The loss against golden values (computed and checked by finite differences elsewhere) and a NumPy rewrite."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xpo_jax.algorithm import losses
from xpo_jax.config.loss import make_loss

SIGMOID = losses.Sigmoid(bonus_clip=500.0)
GOLDEN = json.loads((Path(__file__).parent / "golden" / "xpo_loss.json").read_text())


def total_of(case: dict, dtype, *, alpha_sign: float = 1.0):
    array = lambda name: jnp.array(case[name], dtype)
    policy, reference = array("policy_logps"), array("ref_logps")

    def loss(policy):
        loss_fn = losses.LOSSES[case["kind"]](bonus_clip=case["clip"])
        terms = loss_fn(
            policy,
            reference,
            array("p_first"),
            beta=dtype(case["beta"]),
            alpha=dtype(alpha_sign * case["alpha"]),
        )
        return losses.total(terms, array("weight"), policy.shape[1]), terms

    (value, terms), grad = jax.value_and_grad(loss, has_aux=True)(policy)
    return value, terms, grad


@pytest.mark.parametrize("name", GOLDEN["cases"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.float64, 1e-10)])
def test_golden_values_and_gradients(name, dtype, tolerance):
    case = GOLDEN["cases"][name]
    with jax.enable_x64(dtype == jnp.float64):
        value, terms, grad = total_of(case, dtype)
        assert value.dtype == dtype
        np.testing.assert_allclose(terms.preference, case["preference"], rtol=tolerance, atol=1e-30)
        np.testing.assert_allclose(terms.bonus, case["bonus"], rtol=tolerance, atol=1e-30)
        np.testing.assert_allclose(value, case["total"], rtol=tolerance)
        np.testing.assert_allclose(grad, case["grad"], rtol=tolerance, atol=tolerance * 1e-2)


def test_the_flipped_sign_is_not_matched():
    value, _, _ = total_of(GOLDEN["cases"]["mixed"], jnp.float32)
    flipped, _, _ = total_of(GOLDEN["cases"]["mixed"], jnp.float32, alpha_sign=-1.0)
    assert flipped == pytest.approx(GOLDEN["mixed_sign_flipped_total"], rel=1e-6)
    assert abs(value - GOLDEN["mixed_sign_flipped_total"]) > 0.1


def test_minimising_lowers_the_references_sample():
    """With ties only the bonus is left at z = 0, and descent lowers log pi(B) alone."""
    logps = jnp.array([[-5.0], [-7.0]])
    loss = lambda policy: losses.total(
        SIGMOID(policy, logps, jnp.array([0.5]), beta=0.1, alpha=0.01),
        jnp.ones(1),
        1,
    )
    np.testing.assert_allclose(jax.grad(loss)(logps), [[0.0], [0.01]], atol=1e-9)


@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_gradient_matches_finite_differences(name):
    rng = np.random.default_rng(0)
    policy, reference = rng.normal(-20, 3, (2, 2, 5))
    p, weight = rng.random(5), np.array([1, 1, 0, 0.5, 1.0])

    def numpy_loss(policy):
        ratio = policy - reference
        z = ratio[0] - ratio[1]
        if name == "sigmoid":
            first, second = np.log1p(np.exp(-0.3 * z)), np.log1p(np.exp(0.3 * z))
        else:
            first, second = (z - 1 / 0.6) ** 2, (-z - 1 / 0.6) ** 2
        bonus = 0.05 * (reference[1] + np.clip(ratio[1], -2.0, 2.0))
        return np.sum(weight * (p * first + (1 - p) * second + bonus)) / 7

    with jax.enable_x64(True):

        def ours(policy):
            loss_fn = losses.LOSSES[name](bonus_clip=2.0)
            terms = loss_fn(policy, jnp.array(reference), jnp.array(p), beta=0.3, alpha=0.05)
            return losses.total(terms, jnp.array(weight), 7)

        value, grad = jax.value_and_grad(ours)(jnp.array(policy))
        np.testing.assert_allclose(value, numpy_loss(policy), rtol=1e-12)
        for index in np.ndindex(2, 5):
            step = np.zeros((2, 5))
            step[index] = 1e-6
            slope = (numpy_loss(policy + step) - numpy_loss(policy - step)) / 2e-6
            assert grad[index] == pytest.approx(slope, abs=1e-7)


def test_pairs_without_verdict_have_no_say_even_when_they_are_nan():
    bad = jnp.array([[-1.0, jnp.nan], [-2.0, -3.0]])

    def loss(policy, weight):
        terms = SIGMOID(policy, jnp.zeros((2, 2)), jnp.ones(2), beta=0.1, alpha=0.0)
        return losses.total(terms, weight, 2)

    alone = SIGMOID(bad[:, :1], jnp.zeros((2, 1)), jnp.ones(1), beta=0.1, alpha=0.0)
    assert loss(bad, jnp.array([1.0, 0.0])) == pytest.approx(float(alone.preference[0]) / 2)  # of two rows
    assert loss(bad, jnp.zeros(2)) == 0.0


@pytest.mark.parametrize(
    ("alpha", "beta", "name", "words"),
    [
        (0.1, 0.1, "sigmoid", "no minimum"),
        (0.0, 0.0, "sigmoid", "must be positive"),
        (-0.1, 0.1, "ipo", "must be 0"),
        (float("nan"), 0.1, "sigmoid", "alpha is nan"),
    ],
)
def test_check_coefficients_without_a_minimum_are_refused(alpha, beta, name, words):
    with pytest.raises(ValueError, match=words):
        losses.LOSSES[name](bonus_clip=500.0).check(alpha, beta)
    losses.IPO(bonus_clip=500.0).check(0.1, 0.1)


@pytest.mark.parametrize("loss", losses.LOSSES.values())
def test_registered_losses_are_losses_and_refuse_a_clip_of_zero(loss):
    assert isinstance(loss(bonus_clip=1.0), losses.LossFn)
    with pytest.raises(ValueError, match="bonus_clip is 0, must be positive"):
        loss(bonus_clip=0)


# ---- bonuses, their samples, and flipped verdicts ---------------------------------------------------


def numpy_terms(policy, reference, p, *, kind, alpha, beta, bonus, sample, clip, flips):
    """Return preference and bonus of each pair as the docstring of `BonusLoss` writes them, in float64."""
    ratio = policy - reference
    z = ratio[0] - ratio[1]
    if kind == "sigmoid":
        won, lost = np.log1p(np.exp(-beta * z)), np.log1p(np.exp(beta * z))
    else:
        won, lost = (z - 0.5 / beta) ** 2, (-z - 0.5 / beta) ** 2
    # Chowdhury et al., of a won and of a lost pair, mixed by the verdict
    of_won, of_lost = ((1 - flips) * won - flips * lost), ((1 - flips) * lost - flips * won)
    preference = (p * of_won + (1 - p) * of_lost) / (1 - 2 * flips)
    if bonus == "linear":
        bonuses = alpha * (reference + np.clip(ratio, -clip, clip))
    else:
        bonuses = alpha * (1 / (1 + np.exp(-beta * ratio)) - 0.5) / beta
    return preference, bonuses[1] if sample == "second" else p * bonuses[1] + (1 - p) * bonuses[0]


VARIANTS = [
    (kind, bonus, sample, flips)
    for kind in ("sigmoid", "ipo")
    for bonus in ("linear", "bounded")
    for sample in ("second", "rejected")
    for flips in (0.0, 0.2)
]


@pytest.mark.parametrize(("kind", "bonus", "sample", "flips"), VARIANTS)
def test_variant_equals_numpy_and_its_gradient_finite_differences(kind, bonus, sample, flips):
    rng = np.random.default_rng(1)
    policy, reference = rng.normal(-20, 3, (2, 2, 6))
    p, weight = np.array([1.0, 0.0, 0.5, 0.8, 0.3, 1.0]), np.array([1, 1, 1, 0.5, 1, 0.0])
    settings = {"alpha": 0.07, "beta": 0.3}
    loss = losses.LOSSES[kind](bonus_clip=4.0, bonus=bonus, bonus_sample=sample, flip_rate=flips)

    def expected(policy):
        terms = numpy_terms(
            policy, reference, p, kind=kind, bonus=bonus, sample=sample, clip=4.0, flips=flips, **settings
        )
        return np.sum(weight * sum(terms)) / 6

    with jax.enable_x64(True):

        def ours(policy):
            terms = loss(policy, jnp.array(reference), jnp.array(p), **settings)
            return losses.total(terms, jnp.array(weight), 6)

        value, grad = jax.value_and_grad(ours)(jnp.array(policy))
    np.testing.assert_allclose(value, expected(policy), rtol=1e-12)
    for index in np.ndindex(policy.shape):
        step = np.zeros_like(policy)
        step[index] = 1e-6
        slope = (expected(policy + step) - expected(policy - step)) / 2e-6
        assert grad[index] == pytest.approx(slope, abs=1e-7)


def test_bounded_bonus_golden_values():
    """alpha (sigmoid(beta r) - 1/2) / beta by hand, for beta r of 2, -1 and 0."""
    logps = jnp.array([[0.0, 0.0, 0.0], [-1.0, -4.0, -3.0]]), jnp.array([[0.0, 0.0, 0.0], [-5.0, -2.0, -3.0]])
    terms = losses.Sigmoid(bonus_clip=1.0, bonus="bounded")(*logps, jnp.ones(3), alpha=0.2, beta=0.5)
    np.testing.assert_allclose(terms.bonus, [0.15231883, -0.09242343, 0.0], rtol=1e-6)
    assert not terms.clipped.any()  # the first ratio is 4 nats, beyond bonus_clip


@pytest.mark.parametrize("bonus", ["linear", "bounded"])
@pytest.mark.parametrize(
    ("sample", "p", "lowered"),
    [("second", 0.0, [1]), ("second", 1.0, [1]), ("rejected", 0.0, [0]), ("rejected", 1.0, [1])],
)
def test_minimising_the_bonus_lowers_the_sample_that_it_acts_on_alone(bonus, sample, p, lowered):
    logps = jnp.array([[-5.0], [-7.0]])
    loss = losses.Sigmoid(bonus_clip=500.0, bonus=bonus, bonus_sample=sample)
    grad = jax.grad(lambda policy: loss(policy, logps, jnp.array([p]), beta=0.1, alpha=0.04).bonus[0])(logps)
    slope = 0.04 if bonus == "linear" else 0.01  # alpha, and alpha / 4 where pi = ref
    np.testing.assert_allclose(grad[:, 0], [slope * (i in lowered) for i in (0, 1)], rtol=1e-6)


def test_rejected_bonus_of_a_tie_acts_on_both_by_half():
    logps = jnp.array([[-5.0], [-7.0]])
    loss = losses.Sigmoid(bonus_clip=500.0, bonus_sample="rejected")
    grad = jax.grad(lambda policy: loss(policy, logps, jnp.array([0.5]), beta=0.1, alpha=0.04).bonus[0])(
        logps
    )
    np.testing.assert_allclose(grad[:, 0], [0.02, 0.02], rtol=1e-6)


def test_rejected_bonus_is_clipped_where_its_sample_is():
    policy, reference = jnp.array([[-1.0, -1.0, -1.0], [-90.0, -90.0, -90.0]]), jnp.zeros((2, 3))
    loss = losses.Sigmoid(bonus_clip=5.0, bonus_sample="rejected")
    terms = loss(policy, reference, jnp.array([1.0, 0.0, 0.5]), alpha=0.01, beta=0.1)
    assert terms.clipped.tolist() == [True, False, True]


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_flip_rate_mean_over_flips_is_the_loss_on_the_true_verdict(kind):
    rng = np.random.default_rng(2)
    policy, reference, e = jnp.array(rng.normal(-9, 2, (2, 4))), jnp.array(rng.normal(-9, 2, (2, 4))), 0.3
    robust, plain = losses.LOSSES[kind](bonus_clip=9.0, flip_rate=e), losses.LOSSES[kind](bonus_clip=9.0)
    of = lambda loss, p: loss(policy, reference, jnp.full(4, p), alpha=0.0, beta=0.2).preference
    mean = (1 - e) * of(robust, 1.0) + e * of(robust, 0.0)
    np.testing.assert_allclose(mean, of(plain, 1.0), rtol=1e-5)


def test_bounded_bonus_with_a_large_alpha_has_a_minimum_and_outweighs_a_verdict_from_twice_beta_on():
    beta, r = 0.1, jnp.linspace(-2e4, 2e4, 400_001)  # of the second sample; the first stays where it is
    loss = losses.Sigmoid(bonus_clip=500.0, bonus="bounded")
    loss.check(10 * beta, beta)
    logps = jnp.stack([jnp.zeros_like(r), r]), jnp.zeros((2, len(r)))
    for p in (0.05, 0.95):
        terms = loss(*logps, jnp.full(len(r), p), alpha=10 * beta, beta=beta)
        assert 0 < int(jnp.argmin(terms.preference + terms.bonus)) < len(r) - 1

    def slope(alpha):  # in the second sample's log-probability, where it won and pi = ref
        at = lambda x: loss(jnp.stack([0 * x, x]), jnp.zeros((2, 1)), jnp.zeros(1), alpha=alpha, beta=beta)
        return jax.grad(lambda x: (at(x).preference + at(x).bonus)[0])(jnp.zeros(1))[0]

    assert slope(1.9 * beta) < 0 < slope(2.1 * beta)


def test_on_fresh_policy_pairs_the_second_samples_linear_bonus_has_no_mean_gradient():
    """Where the policy draws both, E grad log pi is 0: only past pairs or the verdict give the bonus a direction."""
    logits = jnp.array([0.3, -1.0, 0.5, 0.0])
    reference = jax.nn.log_softmax(jnp.array([0.1, 0.2, -0.4, 0.6]))
    quality = jnp.array([0.0, 1.0, 2.0, 3.0])
    first, second = (jnp.array(x.ravel()) for x in np.indices((4, 4)))
    p = jax.nn.sigmoid(quality[first] - quality[second])
    drawn = jax.nn.softmax(logits)[first] * jax.nn.softmax(logits)[second]

    def mean_gradient(**variant):
        def mean(logits):
            logps = jax.nn.log_softmax(logits)
            pair = lambda x: jnp.stack([x[first], x[second]])
            loss = losses.Sigmoid(bonus_clip=500.0, **variant)
            return jnp.sum(drawn * loss(pair(logps), pair(reference), p, alpha=0.1, beta=0.2).bonus)

        return np.asarray(jax.grad(mean)(logits))

    np.testing.assert_allclose(mean_gradient(), 0, atol=1e-8)
    rejected = mean_gradient(bonus_sample="rejected")
    assert rejected[0] > 1e-3 and rejected[3] < -1e-3  # descent: away from the worst, towards the best
    assert np.abs(mean_gradient(bonus="bounded")).max() > 1e-5


# ---- the config's group ---------------------------------------------------------------------------

GROUP = {
    "second_candidate": "reference",
    "candidates": 1,
    "pairing": None,
    "name": "sigmoid",
    "beta": 0.1,
    "alpha": 1e-3,
    "bonus_clip": 500.0,
    "bonus": "linear",
    "bonus_sample": "second",
    "flip_rate": 0.0,
    "entropy_weight": 0.0,
    "unfinished_loses": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Margin:
    """A user's loss: a hinge with a margin of its own, and no bonus."""

    margin: float

    def __call__(self, policy_logps, ref_logps, p_first, *, alpha, beta):
        z = (policy_logps - ref_logps)[0] - (policy_logps - ref_logps)[1]
        preference = jnp.maximum(0, self.margin - beta * z * (2 * p_first - 1))
        return losses.LossTerms(z, preference, jnp.zeros_like(z), jnp.zeros_like(z, bool))

    def check(self, alpha, beta):
        if alpha:
            raise ValueError(f"alpha is {alpha}, must be 0; set loss.alpha=0")


@dataclasses.dataclass
class NoLoss:
    """Has fields of the group and nothing that a loss has."""

    bonus_clip: float
    bonus: str
    bonus_sample: str
    flip_rate: float


def test_make_loss_builds_the_named_loss_from_its_fields_in_the_group():
    settings, loss = make_loss(GROUP)
    assert loss == losses.Sigmoid(bonus_clip=500.0) and settings.beta == 0.1
    alpha, beta = settings.coefficients(loss, 3)
    assert (alpha(2), beta(2)) == (1e-3, 0.1)
    of_losses = ("bonus_clip", "bonus", "bonus_sample", "flip_rate")
    group = {name: value for name, value in GROUP.items() if name not in of_losses}
    settings, loss = make_loss(group | {"name": "test_losses:Margin", "margin": 2.0})
    assert loss.margin == 2.0
    with pytest.raises(ValueError, match=r"^loss at step 0: alpha is .* set loss.alpha=0$"):
        settings.coefficients(loss, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "hinge"}, r"loss.name: 'hinge' is unknown; choose sigmoid, ipo, .*package.module:Name"),
        ({"name": None}, r"loss.name: a name is expected"),
        ({"bonus_clipp": 1.0}, r"loss.bonus_clipp: no such field; did you mean 'bonus_clip'\?"),
        ({"beeta": 1.0}, r"loss.beeta: no such field; did you mean 'beta'\?"),
        ({"bonus_clip": None}, r"loss.bonus_clip: a number is expected, found None"),
        ({"bonus_clip": 0.0}, r"loss.bonus_clip is 0.0, must be positive"),
        ({"bonus": "cubic"}, r"loss.bonus: 'linear' or 'bounded' is expected, found 'cubic'"),
        ({"flip_rate": 0.5}, r"loss.flip_rate is 0.5, must be from 0 \(off\) to below 0.5"),
        ({"name": "test_losses:Margin"}, r"loss.bonus\w*: no such field; .*margin"),
        (
            {"name": "test_losses:NoLoss"},
            r"loss.name: test_losses:NoLoss makes a NoLoss, which is no loss; define",
        ),
    ],
)
def test_make_loss_refuses_in_one_line_with_the_field(change, words):
    group = GROUP | change
    with pytest.raises(ValueError, match=words) as raised:
        make_loss(group)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "alpha", "updates", "words"),
    [
        (
            {"second_candidate": "policy"},
            1e-3,
            1,
            "no mean effect on pairs that the policy has just drawn; set loss.alpha to 0",
        ),
        ({"second_candidate": "policy"}, 0.0, 1, ""),
        (
            {"second_candidate": "policy"},
            1e-3,
            2,
            "acts through past pairs alone, which ruined a small network",
        ),
        ({"second_candidate": "policy"}, 0.0, 2, ""),
        ({"second_candidate": "policy", "bonus": "bounded"}, 1e-3, 1, ""),
        ({"second_candidate": "policy", "bonus_sample": "rejected"}, 1e-3, 1, ""),
        ({}, 1e-3, 1, ""),
        (
            {"bonus": "bounded"},
            0.2,
            1,
            "outweighs even a clear verdict: loss.alpha 0.2 >= 2 * loss.beta 0.1; lower",
        ),
        ({"bonus": "bounded"}, 0.19, 1, ""),
    ],
)
def test_bonus_that_does_nothing_or_too_much_is_doubted(change, alpha, updates, words):
    settings, loss = make_loss(GROUP | change)
    doubt = settings.doubt(loss, alpha, 0.1, fresh_pairs=updates == 1)
    assert words in doubt and bool(words) == bool(doubt) and "\n" not in doubt


def test_bonus_on_a_second_sample_from_another_distribution_is_not_doubted():
    settings, loss = make_loss(GROUP | {"second_candidate": "policy"})
    for fresh_pairs in (True, False):
        assert not settings.doubt(loss, 1e-3, 0.1, fresh_pairs=fresh_pairs, one_distribution=False)


def test_bonus_with_two_policy_samples_is_accepted():
    settings, loss = make_loss(GROUP | {"second_candidate": "policy"})
    alpha, _ = settings.coefficients(loss, 1)
    assert alpha(0) == GROUP["alpha"]


def test_make_loss_missing_field_is_named():
    for name in GROUP:
        with pytest.raises(ValueError, match=rf"loss.{name} is missing"):
            make_loss({field: value for field, value in GROUP.items() if field != name})
