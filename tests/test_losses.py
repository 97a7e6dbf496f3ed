"""The loss against golden values (computed and checked by finite differences elsewhere) and a NumPy rewrite."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xpo_jax.algorithm import losses

GOLDEN = json.loads((Path(__file__).parent / "golden" / "xpo_loss.json").read_text())


def total_of(case: dict, dtype, *, alpha_sign: float = 1.0):
    array = lambda name: jnp.array(case[name], dtype)
    policy, reference = array("policy_logps"), array("ref_logps")

    def loss(policy):
        terms = losses.xpo(
            policy,
            reference,
            array("p_first"),
            beta=dtype(case["beta"]),
            alpha=dtype(alpha_sign * case["alpha"]),
            kind=case["kind"],
            clip=case["clip"],
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
        losses.xpo(policy, logps, jnp.array([0.5]), beta=0.1, alpha=0.01, kind="sigmoid", clip=500.0),
        jnp.ones(1),
        1,
    )
    np.testing.assert_allclose(jax.grad(loss)(logps), [[0.0], [0.01]], atol=1e-9)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_gradient_matches_finite_differences(kind):
    rng = np.random.default_rng(0)
    policy, reference = rng.normal(-20, 3, (2, 2, 5))
    p, weight = rng.random(5), np.array([1, 1, 0, 0.5, 1.0])

    def numpy_loss(policy):
        ratio = policy - reference
        z = ratio[0] - ratio[1]
        if kind == "sigmoid":
            first, second = np.log1p(np.exp(-0.3 * z)), np.log1p(np.exp(0.3 * z))
        else:
            first, second = (z - 1 / 0.6) ** 2, (-z - 1 / 0.6) ** 2
        bonus = 0.05 * (reference[1] + np.clip(ratio[1], -2.0, 2.0))
        return np.sum(weight * (p * first + (1 - p) * second + bonus)) / 7

    with jax.enable_x64(True):

        def ours(policy):
            terms = losses.xpo(
                policy, jnp.array(reference), jnp.array(p), beta=0.3, alpha=0.05, kind=kind, clip=2.0
            )
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
        terms = losses.xpo(
            policy, jnp.zeros((2, 2)), jnp.ones(2), beta=0.1, alpha=0.0, kind="sigmoid", clip=500.0
        )
        return losses.total(terms, weight, 2)

    alone = losses.xpo(
        bad[:, :1], jnp.zeros((2, 1)), jnp.ones(1), beta=0.1, alpha=0.0, kind="sigmoid", clip=500.0
    )
    assert loss(bad, jnp.array([1.0, 0.0])) == pytest.approx(float(alone.preference[0]) / 2)  # of two rows
    assert loss(bad, jnp.zeros(2)) == 0.0


@pytest.mark.parametrize(
    ("alpha", "beta", "kind", "words"),
    [
        (0.1, 0.1, "sigmoid", "no minimum"),
        (0.0, 0.0, "sigmoid", "must be positive"),
        (-0.1, 0.1, "ipo", "must be 0"),
        (float("nan"), 0.1, "sigmoid", "alpha is nan"),
    ],
)
def test_strengths_without_a_minimum_are_refused(alpha, beta, kind, words):
    with pytest.raises(ValueError, match=words):
        losses.check_strengths(alpha, beta, kind, "step 3")
    losses.check_strengths(0.1, 0.1, "ipo", "step 3")
