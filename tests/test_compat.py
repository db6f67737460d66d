"""Questions about JAX that `_compat.py` answers for all other modules."""

import jax
import jax.numpy as jnp
import pytest

from qpaged import _compat


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("0.10.2", (0, 10, 2)), ("0.13.0.dev20270101+cpu", (0, 13, 0)), ("1.0", (1, 0)), ("unknown", ())],
)
def test_a_version_is_its_first_three_numbers(version, numbers):
    assert _compat.version_tuple(version) == numbers


def test_an_older_jax_is_named_with_the_version_that_is_needed(monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.9.2")
    assert _compat.newer_jax_needed((0, 10)) == "needs JAX 0.10 or newer, but this is 0.9.2"
    assert _compat.newer_jax_needed((0, 9, 2)) is None
    assert not _compat.has_pallas_tpu()
    monkeypatch.setattr(jax, "__version__", "0.10.0")
    assert _compat.has_pallas_tpu() and not _compat.has_mosaic_gpu_interpreter()


def test_primitives_exist_under_their_names_in_lax():
    assert _compat.primitive_exists("dot_general")
    assert not _compat.primitive_exists("dot_specific")


def test_inner_jaxprs_are_found_in_parameters_and_in_tuples_of_them():
    def f(x):
        x = jax.jit(jnp.sin)(x)
        return jax.lax.cond(x > 0, jnp.cos, jnp.tanh, x)

    found = []
    for eqn in jax.make_jaxpr(f)(1.0).eqns:
        for inner in _compat.inner_jaxprs(eqn):
            jaxpr, _ = _compat.jaxpr_and_consts(inner)
            found.append({inner_eqn.primitive.name for inner_eqn in jaxpr.eqns})
    assert found == [{"sin"}, {"tanh"}, {"cos"}]
