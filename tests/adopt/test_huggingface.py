"""generate of transformers' Flax models runs on a quantized cache."""

import jax
import numpy as np
import pytest
from support.packages import require_packages

require_packages("flax", "transformers")

import transformers
from adopted import encoder_decoders
from adopted import huggingface as cases

import qpaged
from qpaged.adopt.huggingface import quantize_cache
from qpaged.testing._laws_cost import arrays_in

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("standard_promotion")]
PROMPT = np.random.default_rng(0).integers(3, cases.VOCABULARY, (2, 16)).astype(np.int32)
GREEDY = {"max_length": 32, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize("name", cases.MODELS)
def test_generate_runs_on_a_quantized_cache(name):
    model = cases.model(name)
    quantized = quantize_cache(model, "int8", strict=True)
    cache = quantized.init_cache(2, 32)
    arrays = jax.tree_util.tree_leaves(cache, is_leaf=lambda x: isinstance(x, qpaged.QuantizedArray))
    assert sum(isinstance(array, qpaged.QuantizedArray) for array in arrays) == 2 * cases.LAYERS
    tokens = quantized.generate(PROMPT, **GREEDY).sequences
    assert tokens.shape == (2, 32)
    # Weights are random, and later tokens may be near ties.
    np.testing.assert_array_equal(tokens[:, 16], model(PROMPT).logits[:, -1].argmax(axis=-1))
    assert not quantized.quantized_step.report()
    assert type(model) is not type(quantized) and isinstance(quantized, type(model))


@pytest.mark.parametrize("name", encoder_decoders.MODELS)
def test_generate_of_an_encoder_decoder(name):
    """The decoder's own cache is quantized, also where beams change places; cross attention has none."""
    model = encoder_decoders.model(name)
    quantized = quantize_cache(model, "int8", strict=True)
    encoder_input = encoder_decoders.encoder_input(name, batch=2)
    settings = {"max_length": 24, "do_sample": False, "eos_token_id": None}
    for num_beams in (1, 3):
        want = model.generate(encoder_input, num_beams=num_beams, **settings).sequences
        got = quantized.generate(encoder_input, num_beams=num_beams, **settings).sequences
        # Weights are random, and later tokens may be near ties.
        assert got.shape == want.shape
        np.testing.assert_array_equal(got[:, :4], want[:, :4])
    assert len(quantized.quantized_step.found.leaves) == 2 * encoder_decoders.LAYERS
    assert not quantized.quantized_step.report()
    assert isinstance(quantized, type(model))


def test_the_loop_of_generate_makes_no_float_of_the_cache():
    """The length is one at which the model's own masks do not outgrow the cache."""
    model = quantize_cache(cases.model("Llama"), "int8", strict=True)
    settings = GREEDY | {"max_length": 1040}
    jaxpr = jax.make_jaxpr(lambda prompt: model.generate(prompt, **settings).sequences)(PROMPT)
    array = model.init_cache(2, 1040)["model"]["layers"]["0"]["self_attn"]["cached_key"]
    floats = {aval.shape for _, aval in arrays_in(jaxpr.jaxpr) if str(aval.dtype) == "float32"}
    assert array.shape not in floats
    assert array.shape in {aval.shape for _, aval in arrays_in(jaxpr.jaxpr) if str(aval.dtype) == "int8"}


def test_padded_rows_give_the_logits_of_a_float_cache():
    """A row whose prompt begins with padding gives the same logits as with a float cache."""
    model = cases.model("Llama")
    mask = np.ones_like(PROMPT)
    mask[1, :10] = 0
    outs = []
    for one in (model, quantize_cache(model, "int8")):
        full = np.concatenate([mask, np.ones((2, 16), np.int32)], axis=1)
        cache = one.init_cache(2, 32)
        out = one(PROMPT, attention_mask=full, position_ids=np.cumsum(mask, 1) - 1, past_key_values=cache)
        garbage = np.where(mask == 0, 5, PROMPT)
        cache = one.init_cache(2, 32)
        other = one(garbage, attention_mask=full, position_ids=np.cumsum(mask, 1) - 1, past_key_values=cache)
        outs.append((np.asarray(out.logits[1, -1]), np.asarray(other.logits[1, -1])))
    (want, same), (got, with_garbage) = outs
    np.testing.assert_allclose(want, same, atol=1e-4)
    scale = np.abs(want).max()
    assert np.abs(got - want).max() < 0.03 * scale
    assert np.abs(with_garbage - got).max() < 0.03 * scale


def test_finished_rows_do_not_disturb_the_others():
    model = cases.model("GPT2")
    settings = {**GREEDY, "eos_token_id": int(model.generate(PROMPT, **GREEDY).sequences[0, 18])}
    quantized = quantize_cache(model, "int8:token")
    tokens = np.asarray(quantized.generate(PROMPT, **settings).sequences)
    alone = np.asarray(quantized.generate(PROMPT[1:], **settings).sequences)
    np.testing.assert_array_equal(tokens[1], alone[0])
    assert (tokens[0, 19:] == 0).all()


def test_the_kl_of_trained_weights_is_small():
    case = cases.trained()
    prompt = jax.numpy.asarray(case.prompt[None, 4000:4064], jax.numpy.int32)
    example = (case.params, prompt, jax.numpy.int32(0), case.cache(1, 128))
    step = qpaged.adopt.quantize_cache(case.step, "int8", example=example, strict=True)
    want, _ = case.step(*example)
    got, _ = step(*example[:3], step.init(case.cache(1, 128)))
    p = jax.nn.log_softmax(want, axis=-1)
    q = jax.nn.log_softmax(got, axis=-1)
    assert float((jax.numpy.exp(p) * (p - q)).sum(-1).mean()) < 1e-3


def test_errors_name_what_came():
    with pytest.raises(TypeError, match="but came as LlamaConfig"):
        quantize_cache(transformers.LlamaConfig(), "int8")
    model = cases.model("Llama")
    with pytest.raises(TypeError, match="must be an instance, but is the class FlaxLlamaForCausalLM"):
        quantize_cache(type(model), "int8")
    with pytest.raises(TypeError, match="has a quantized cache already"):
        quantize_cache(quantize_cache(model, "int8"), "int8")
    with pytest.raises(qpaged.RegistryError, match="int9"):
        quantize_cache(cases.model("Llama"), "int9")


def test_the_old_name_of_the_quantizer_goes_on_working():
    with pytest.warns(DeprecationWarning, match="format= of quantize_cache is now quantizer="):
        quantized = quantize_cache(cases.model("Llama"), format="int8")
    assert quantized.quantized_step.found.leaves
