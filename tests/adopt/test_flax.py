"""Flax attention with a quantized cache: nnx modules are called as before, linen through its variables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import normal
from support.packages import require_packages

require_packages("flax")

from flax import linen, nnx

import qpaged
from qpaged import adopt
from qpaged.adopt.flax import quantize_linen, quantize_nnx
from qpaged.arrays import is_cache_array

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("standard_promotion"),
]
BATCH, LENGTH, WIDTH, HEADS, LAYERS = 2, 32, 64, 2, 2
SHAPE = (BATCH, LENGTH, WIDTH)
XS = normal(12, BATCH, 1, WIDTH)


class Decoder(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List(
            nnx.MultiHeadAttention(num_heads=HEADS, in_features=WIDTH, decode=True, rngs=rngs)
            for _ in range(LAYERS)
        )
        for layer in self.layers:
            layer.init_cache(SHAPE)

    def __call__(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def run(decode, model):
    return jnp.stack([decode(model, x) for x in XS])


def is_close(got, want, tolerance=0.05):
    return float(jnp.abs(got - want).max()) < tolerance * float(jnp.abs(want).max())


@pytest.mark.parametrize(
    "spelling", ["int8", "int8:token", "fp8_e4m3", "int8:channel+offset/int4:token", "int8+exact9"]
)
def test_nnx_modules_are_called_as_before(spelling):
    plain, model = Decoder(), Decoder()
    step = quantize_nnx(model, spelling, example=(XS[0],), strict=True)
    assert [leaf.role for leaf in step.found.leaves] == ["key", "value"] * LAYERS
    first = model.layers[0].cached_key.get_value()
    assert is_cache_array(first) and first.shape == (*SHAPE[:2], HEADS, WIDTH // HEADS)
    want = run(lambda model, x: model(x), plain)
    got = run(nnx.jit(lambda model, x: model(x)), model)
    assert is_close(got, want, 0.05 if "int4" not in spelling else 0.3)
    assert type(model.layers[0]).__name__ == "MultiHeadAttention"
    assert isinstance(model.layers[0], nnx.MultiHeadAttention)
    assert int(model.layers[0].cache_index[...]) == len(XS)
    after = model.layers[0].cached_key.get_value()
    assert jax.tree_util.tree_structure(after) == jax.tree_util.tree_structure(first)


def test_eager_and_jitted_calls_leave_the_same():
    eager, jitted = Decoder(), Decoder()
    for model in (eager, jitted):
        quantize_nnx(model, "int8", example=(XS[0],))
    a, b = run(lambda m, x: m(x), eager), run(nnx.jit(lambda m, x: m(x)), jitted)
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_other_modules_of_the_class_stay_as_they_are():
    model, other = Decoder(), Decoder()
    quantize_nnx(model, "int8", example=(XS[0],))
    assert type(other.layers[0]) is nnx.MultiHeadAttention
    assert isinstance(other.layers[0].cached_key.get_value(), jax.Array)


class Clipping(nnx.Module):
    """Attention that returns its keys decoded."""

    def __init__(self):
        self.keys = nnx.Cache(jnp.zeros((BATCH, LENGTH, WIDTH)))
        self.values = nnx.Cache(jnp.zeros((BATCH, LENGTH, WIDTH)))

    def __call__(self, x):
        for variable in (self.keys, self.values):
            variable[...] = jax.lax.dynamic_update_slice_in_dim(variable[...], x, 3, 1)
        weights = jax.nn.softmax(jnp.einsum("btd,bsd->bts", x, self.keys[...]), axis=-1)
        self.keys[...] = jnp.clip(self.keys[...], -8, 8)
        return jnp.einsum("bts,bsd->btd", weights, self.values[...])


@pytest.mark.filterwarnings("ignore::qpaged.implicit.MaterializeWarning")
def test_a_variable_that_is_left_decoded_is_quantized_again():
    model = Clipping()
    step = quantize_nnx(model, "int8", example=(XS[0],))
    before = jax.tree_util.tree_structure(model.keys.get_value())
    nnx.jit(lambda model, x: model(x))(model, XS[0])
    assert jax.tree_util.tree_structure(model.keys.get_value()) == before
    assert "return" in {place.primitive for place in step.report()}


@nnx.vmap(in_axes=0, out_axes=0)
def stacked(key):
    layer = nnx.MultiHeadAttention(num_heads=HEADS, in_features=WIDTH, decode=True, rngs=nnx.Rngs(key))
    layer.init_cache(SHAPE)
    return layer


def through_layers(layers, x):
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def body(layer, x):
        return x + layer(x)

    return body(layers, x)


def test_stacked_layers_are_scanned():
    keys = jax.random.split(jax.random.key(0), LAYERS)
    plain, model = stacked(keys), stacked(keys)
    step = quantize_nnx(model, "int8", example=(XS[0],), call=through_layers, strict=True)
    assert {leaf.axes[0] for leaf in step.found.leaves} == {"layers"}
    assert is_close(run(nnx.jit(through_layers), model), run(through_layers, plain))
    assert model.cached_key.get_value().shape[0] == LAYERS


def test_linen_variables_are_quantized_by_a_step():
    module = linen.MultiHeadDotProductAttention(num_heads=HEADS, decode=True)
    variables = module.init(jax.random.key(0), jnp.zeros(SHAPE))
    step = quantize_linen(module, "int8", example=(variables, XS[0]), strict=True)
    quantized, jitted = step.init(variables), jax.jit(step)
    for x in XS:
        want, updates = module.apply(variables, x, mutable=["cache"])
        variables |= updates
        got, updates = jitted(quantized, x)
        quantized |= updates
    assert is_close(got, want) and jitted._cache_size() == 1
    assert isinstance(quantized["cache"]["cached_key"], qpaged.QuantizedArray)


def test_errors_name_what_came():
    with pytest.raises(TypeError, match="model must be an nnx module, but came as Dense"):
        quantize_nnx(linen.Dense(WIDTH), "int8", example=(XS[0],))
    no_cache = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
    with pytest.raises(adopt.CacheNotFoundError, match="with none of its 3 arrays"):
        quantize_nnx(no_cache, "int8", example=(XS[0],))


class Variables(nnx.Module):
    """Keys and values for a function to attend with: the module cannot be called."""

    def __init__(self):
        self.keys = nnx.Cache(jnp.zeros((BATCH, LENGTH, WIDTH)))
        self.values = nnx.Cache(jnp.zeros((BATCH, LENGTH, WIDTH)))


def test_variables_must_be_of_a_module_that_can_be_called():
    def attend(model, x):
        for variable in (model.keys, model.values):
            variable[...] = jax.lax.dynamic_update_slice_in_dim(variable[...], x, 3, 1)
        weights = jax.nn.softmax(jnp.einsum("btd,bsd->bts", x, model.keys[...]), axis=-1)
        return jnp.einsum("bts,bsd->btd", weights, model.values[...])

    model = Variables()
    with pytest.raises(
        ValueError, match=r"with __call__ around each variable .* state/keys/value is in none; give"
    ):
        quantize_nnx(model, "int8", example=(XS[0],), call=attend)
    assert isinstance(model.keys.get_value(), jax.Array)


@pytest.mark.filterwarnings("default::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::qpaged.implicit.MaterializeWarning")
def test_the_old_name_of_the_quantizer_goes_on_working():
    module = linen.MultiHeadDotProductAttention(num_heads=HEADS, decode=True)
    variables = module.init(jax.random.key(0), jnp.zeros(SHAPE))
    with pytest.warns(DeprecationWarning, match="format= of quantize_linen is now quantizer="):
        quantize_linen(module, format="int8", example=(variables, XS[0]))
    model = Clipping()
    with pytest.warns(DeprecationWarning, match="format= of quantize_nnx is now quantizer="):
        quantize_nnx(model, format="int8", example=(XS[0],))
    assert isinstance(model.keys.get_value(), qpaged.QuantizedArray)
