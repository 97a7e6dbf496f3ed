"""Programs that runs share: one compilation for equal programs, and one each for programs that differ."""

import dataclasses

import jax
import numpy as np
import pytest
from fake_programs import PLAIN, tiny_programs
from fast_programs import identity

from xpo_jax.algorithm.losses import Sigmoid
from xpo_jax.runtime.compilation import Program

pytestmark = pytest.mark.usefixtures("shared_programs")
MESH = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])


@dataclasses.dataclass(frozen=True)
class Scale:
    factors: dict

    def apply(self, x):
        return x * self.factors["all"]


def power(exponent, offset=0):
    def raise_to(x):
        return x**exponent + offset

    return raise_to


def compiled(function, x=np.arange(3.0)):  # noqa: B008, never written to
    program = Program("power", MESH, function)
    executable = program.compile(x)
    return executable, np.asarray(program(x)).tolist()


def test_shared_programs_equal_closures_are_compiled_once():
    first, squares = compiled(power(2))
    second, same = compiled(power(2))
    assert first is second and squares == same == [0, 1, 4]
    assert compiled(Scale({"all": 2.0}).apply)[0] is compiled(Scale({"all": 2.0}).apply)[0]


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (power(3), [0, 1, 8]),  # another value in the closure
        (power(2, offset=np.array([1.0, 2.0, 3.0])), [1, 3, 7]),
        (lambda x: x * x * 2, [0, 2, 8]),  # other code
        (Scale({"all": 3.0}).apply, [0, 3, 6]),
    ],
)
def test_shared_programs_other_function_is_compiled_by_itself(other, expected):
    first, _ = compiled(power(2))
    executable, values = compiled(other)
    assert executable is not first and values == expected


def test_shared_programs_other_arguments_are_compiled_by_themselves():
    executables = [compiled(power(2), x)[0] for x in (np.arange(3.0), np.arange(4.0), np.arange(3))]
    assert len(set(map(id, executables))) == 3


def test_identity_number_types_differ():
    assert len({identity(value) for value in (1, 1.0, True, np.float32(1))}) == 4
    assert identity(object()) != identity(object())


def identities(**changes):
    """Return the identity of each program of a run, by name."""
    return {
        declared.program.name: declared.program.identity for declared in tiny_programs(**changes)._declared()
    }


def test_identity_programs_of_equal_runs_are_equal():
    """Otherwise every test compiles its own, which takes the suite twice as long."""
    assert identities() == identities() and len(identities()) == 8


@pytest.mark.parametrize(
    ("changes", "different"),
    [
        ({"loss": Sigmoid(bonus_clip=6.0)}, {"accumulate"}),
        ({"entropy_weight": 0.5}, {"accumulate"}),
        ({"sampling": PLAIN | {"temperature": 0.8}}, {"sample", "score", "accumulate"}),
        ({"sampling": PLAIN | {"top_k": 3}}, {"sample"}),
    ],
)
def test_identity_programs_of_other_runs_differ(changes, different):
    ours, others = identities(), identities(**changes)
    assert {name for name in ours if ours[name] != others[name]} == different
