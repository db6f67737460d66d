"""The examples of qax's README, with the import changed.

`jax.core.get_aval` is gone from JAX, so the checks of LoraMatrix ask the arrays themselves. Instead of
downloaded models there are small functions that use their weights in the same way.
"""

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.implicit_arrays import needs_own_implementation

import qpaged.implicit as qax


def make_zeros():
    class Zeros(qax.ImplicitArray):
        default_dtype = jnp.float32

        def materialize(self):
            # self.shape and self.dtype will be
            # populated by the ImplicitArray constructor
            return jnp.zeros(self.shape, self.dtype)

        def __str__(self):
            return f"Zeros({self.shape}, {self.dtype})"

    return Zeros


def test_the_zeros_example():
    Zeros = make_zeros()
    z = Zeros(shape=(2, 3))

    @qax.use_implicit_args
    def f(x, y):
        return (x + y)[0, 0]

    with pytest.warns(UserWarning, match="add"):
        assert f(z, jnp.ones(3)) == 1.0

    def get_binop_result_shape_dtype(a, b):
        out_shape = jnp.broadcast_shapes(jnp.shape(a), jnp.shape(b))
        out_dtype = jnp.result_type(a.dtype, b.dtype)
        return out_shape, out_dtype

    @qax.primitive_handler("add")
    def my_add_handler(primitive, a: Zeros, b):
        out_shape, out_dtype = get_binop_result_shape_dtype(a, b)
        if isinstance(b, Zeros):
            # We can return further ImplicitArray instances if we want
            return Zeros(shape=out_shape, dtype=out_dtype)
        # Return b, possibly modifying its shape or dtype
        return jnp.broadcast_to(b, out_shape).astype(out_dtype)

    assert f(z, jnp.ones(3)) == 1.0  # no warning any more: warnings are errors here

    @qax.primitive_handler("mul")
    def handle_mul(primitive, a: Zeros, b):
        out_shape, out_dtype = get_binop_result_shape_dtype(a, b)
        return Zeros(shape=out_shape, dtype=out_dtype)

    @jax.jit
    @qax.use_implicit_args
    def g(x, y):
        return (1 + x) * y

    assert str(g(z, z)) == "Zeros((2, 3), float32)"

    @qax.primitive_handler("broadcast_in_dim")
    def broadcast(primitive, a: Zeros, *, shape, broadcast_dimensions, **later):
        result_shape = jax.eval_shape(
            partial(jax.lax.broadcast_in_dim, shape=shape, broadcast_dimensions=broadcast_dimensions),
            a.aval,  # ImplicitArray has an aval property which will get an abstract shape/dtype
        ).shape
        return Zeros(shape=result_shape, dtype=a.dtype)

    def model(inputs, params):
        return jax.nn.sigmoid(inputs @ params["kernel"] + params["bias"])

    inputs = jnp.ones((4, 3))
    params = {"kernel": jnp.ones((3, 5)), "bias": jnp.zeros(5)}
    params_with_zeros = {**params, "bias": Zeros(shape=(5,))}
    output = qax.use_implicit_args(model)(inputs, params=params_with_zeros)
    np.testing.assert_array_equal(output, model(inputs, params))


@needs_own_implementation
def test_a_handler_written_before_a_parameter_existed_is_called_without_it():
    Zeros = make_zeros()

    @qax.primitive_handler("broadcast_in_dim")
    def broadcast(primitive, a: Zeros, *, shape, broadcast_dimensions):  # as the README has it
        return Zeros(shape=shape, dtype=a.dtype)

    out = qax.use_implicit_args(lambda b: jnp.broadcast_to(b, (2, 3)))(Zeros(shape=(3,)))
    assert isinstance(out, Zeros)
    assert out.shape == (2, 3)


@dataclass
class LoraMatrix(qax.ImplicitArray):
    """Represent W + A B^T"""

    w: qax.ArrayValue
    a: qax.ArrayValue
    b: qax.ArrayValue

    # auxiliary data example
    is_array_happy: bool = qax.aux_field(default=True)

    def __post_init__(self):
        super().__post_init__()
        assert len(self.w.shape) == len(self.a.shape) == len(self.b.shape) == 2
        assert self.a.shape[1] == self.b.shape[1]
        assert self.a.shape[0] == self.w.shape[0]
        assert self.b.shape[0] == self.w.shape[1]
        assert self.a.dtype == self.b.dtype == self.w.dtype

    def materialize(self):
        return self.w + self.a @ self.b.T


# The README says jax.Array. qax skips such a handler when values are traced.
Dense = Any if qax.provider().name == "qax" else jax.Array


@qax.primitive_handler("dot_general")
def matmul_with_lora(primitive, x: Dense, w: LoraMatrix, *, dimension_numbers, **kwargs):
    # For this example, we'll only handle the simple case of of x @ w, rather than
    # all possible dot_general invocations
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers

    # This check just makes sure that all that's happening is a simple matmul
    if not (
        len(w.shape) == 2
        and lhs_contract == (x.ndim - 1,)
        and rhs_contract == (0,)
        and lhs_batch == ()
        and rhs_batch == ()
    ):
        # If we want to only partially handle a particular primitive,
        # we can fall back to the default logic by returning NotImplemented
        return NotImplemented

    kwargs = {**kwargs, "dimension_numbers": dimension_numbers}
    result = qax.default_handler(primitive, x, w.w, **kwargs)
    xa = qax.default_handler(primitive, x, w.a, **kwargs)
    xab = qax.default_handler(primitive, xa, w.b.T, **kwargs)
    result += xab
    return result


def mlp(params, inputs):
    hidden = jnp.tanh(inputs @ params["up"])
    return hidden @ params["down"]


def mlp_params(wrap=lambda w, key: w):
    keys = jax.random.split(jax.random.key(0), 4)
    up = jax.random.normal(keys[0], (6, 16)) / 4
    down = jax.random.normal(keys[1], (16, 5)) / 4
    return {"up": wrap(up, keys[2]), "down": wrap(down, keys[3])}


def to_lora(w, key, lora_dim=8):
    a = jax.random.normal(key, (w.shape[0], lora_dim), w.dtype)
    b = jnp.zeros((w.shape[1], lora_dim), w.dtype)
    return LoraMatrix(w, a, b)


def test_lora_computes_what_dense_weights_do():
    inputs = jnp.linspace(-1, 1, 12).reshape(2, 6)
    output = qax.use_implicit_args(mlp)(mlp_params(to_lora), inputs)  # a warning would be an error
    np.testing.assert_allclose(output, mlp(mlp_params(), inputs), rtol=1e-6)


def train(optimizer_update, params, state, steps=20):
    inputs, targets = jnp.linspace(-1, 1, 12).reshape(2, 6), jnp.array([1, 3])

    @qax.use_implicit_args
    def loss_fn(params):
        logprobs = jax.nn.log_softmax(mlp(params, inputs))
        target_logprobs = jnp.take_along_axis(logprobs, targets[:, None], axis=-1)
        return -jnp.sum(target_logprobs)

    grad_fn = jax.value_and_grad(loss_fn)

    @jax.jit
    def update(params, state):
        loss, grads = grad_fn(params)
        updates, state = optimizer_update(grads, state, params)
        return loss, jax.tree_util.tree_map(jnp.add, params, updates), state

    losses = []
    for _ in range(steps):
        loss, params, state = update(params, state)
        losses.append(float(loss))
    return losses, params


class Sgd(NamedTuple):
    """A named pair, as optax's optimizers are."""

    init: Any
    update: Any


def sgd(rate=0.1):
    def update(updates, state, params=None):
        return jax.tree_util.tree_map(lambda g: -rate * g, updates), state

    return Sgd(lambda params: (), update)


def test_lora_matrices_can_be_trained():
    losses, params = train(sgd().update, mlp_params(to_lora), ())
    assert losses[-1] < losses[0] / 2
    assert isinstance(params["up"], LoraMatrix)


@needs_own_implementation
@pytest.mark.parametrize("use_scalar_zeros", [False, True])
def test_frozen_weights_of_lora_matrices_are_not_updated(use_scalar_zeros):
    before = mlp_params(to_lora)
    optimizer = qax.utils.freeze_keys(sgd(), LoraMatrix, ["w"], use_scalar_zeros=use_scalar_zeros)
    losses, after = train(optimizer.update, before, ())
    assert losses[-1] < losses[0]
    for name in before:
        np.testing.assert_array_equal(before[name].w, after[name].w)
        assert (before[name].b != after[name].b).any()


def test_zeros_inside_a_lora_matrix():
    Zeros = make_zeros()

    @qax.use_implicit_args
    def g(w, x):
        return jnp.sum(x @ w)

    w = jnp.ones((3, 5))
    x = jnp.arange(3, dtype=jnp.float32)

    lora_with_symbolic_zero = LoraMatrix(w=w, a=Zeros(shape=(w.shape[0], 6)), b=Zeros(shape=(w.shape[1], 6)))
    assert g(w, x) == 15.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert g(lora_with_symbolic_zero, x) == 15.0
    text = " ".join(str(w.message) for w in caught)
    assert "dot_general" in text
    assert "transpose" in text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(qax.materialize_nested(lora_with_symbolic_zero, full=True), w)
