"""A slip of a format's author is refused where the class is defined, or when an instance is first made."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest

import qpaged
from qpaged.formats._checks import RENAMED


@dataclass(frozen=True)
class Sound(qpaged.Quantizer):
    """Nearest codes of a token."""

    name: ClassVar[str] = "sound"
    bound: ClassVar[float] = 0.6

    def scale(self, absmax):
        return absmax / 100

    def encode(self, units):
        return jnp.round(units).astype(jnp.int8)

    def decode(self, codes, dtype):
        return codes.astype(dtype)


@pytest.mark.parametrize(
    ("bits", "advice"),
    [
        *((bits, "take the next larger one") for bits in (1, 7)),
        (16, "take 8 for one code per element"),
        ("4", "take 8 for one code per element"),
    ],
)
def test_bits_that_nothing_packs_are_refused_where_the_class_is_defined(bits, advice):
    message = rf"Odd.bits must be one of 8, 6, 5, 4, 3, 2, .* but is {bits!r}; {advice}"
    with pytest.raises(TypeError, match=message):
        type("Odd", (Sound,), {"bits": bits})


@pytest.mark.parametrize("old", RENAMED)
def test_what_is_overridden_under_its_old_name_is_refused_with_the_new_one(old):
    with pytest.raises(TypeError) as refusal:
        type("Stale", (Sound,), {old: None})
    assert f"Stale.{old} is now {RENAMED[old]}" in str(refusal.value)


def test_what_a_mixin_overrides_under_its_old_name_is_refused_too():
    mixin = type("Mixin", (), {"shift": None})
    with pytest.raises(TypeError, match=r"Mixed\.shift is now offset, an object with from_scales"):
        type("Mixed", (mixin, qpaged.Quantizer), {})


@pytest.mark.parametrize(
    ("ability", "missing"),
    [
        ("growth", "covers, grown_scale, requantize"),
        ("offset", "from_scales"),
        ("transform", "forward, inverse"),
    ],
)
def test_an_ability_is_none_or_an_object_with_its_methods(ability, missing):
    half = type("Half", (Sound,), {ability: 5})
    with pytest.raises(
        TypeError, match=rf"Half.{ability} must be None or .* but is 5, which lacks {missing}"
    ):
        half()


def test_encode_may_ask_for_the_granularity_and_for_neighbouring_channels():
    @dataclass(frozen=True)
    class Neighbours(Sound):
        elementwise: ClassVar[bool] = False

        def encode(self, units):
            levels = {"token": 100, "group32": 50}[self.granularity]
            return jnp.round(units + 0 * levels * units.shape[-1]).astype(jnp.int8)

    assert Neighbours().granularity == "token"
    message = "granularity must be one of token, group32, group64, group128 for sound, but came as 'page'"
    with pytest.raises(ValueError, match=message):
        Neighbours("page")


def test_a_transform_that_is_a_method_is_refused():
    message = r"Turned.transform must be None or an object with forward\(x, axis\) and inverse\(x, axis\)"
    with pytest.raises(TypeError, match=message):
        type("Turned", (Sound,), {"transform": lambda self, x, axis: x})


@pytest.mark.parametrize(
    ("attribute", "meaning"),
    [("name", "the first part of its spelling"), ("bound", "its largest error in units of the scale")],
)
def test_a_format_without_a_name_or_a_bound_is_refused(attribute, meaning):
    lacking = type("Lacking", (Sound,), {attribute: None})
    with pytest.raises(
        TypeError, match=f"Lacking must have a class attribute {attribute}, {meaning}; set it"
    ):
        lacking()


def test_codes_that_are_floats_are_refused():
    floats = type("Floats", (Sound,), {"encode": lambda self, units: jnp.round(units)})
    with pytest.raises(
        TypeError, match=r"Floats.encode must return integers, but returns float32; cast them"
    ):
        floats()


def test_scales_of_whole_blocks_do_not_grow():
    rule = qpaged.get_quantizer("lloyd3").block_fit
    with pytest.raises(TypeError, match=r"Grows.growth must be None beside block_fit, which gives one"):
        type("Grows", (Sound,), {"block_fit": rule})()


@pytest.mark.parametrize(("bits", "state_bits"), [(2, 2), (2, 11), (8, 10)])
def test_states_are_of_more_bits_than_codes(bits, state_bits):
    message = rf"Deep.state_bits must be None, or more than its {bits} bits by at most 8, .* is {state_bits}"
    with pytest.raises(TypeError, match=message):
        type("Deep", (Sound,), {"bits": bits, "state_bits": state_bits})()


def test_an_instance_is_checked_by_shapes_alone(monkeypatch):
    def computes(*_):
        raise AssertionError("something was computed")

    monkeypatch.setattr(jax.Array, "__array__", computes, raising=False)
    assert str(Sound()) == "sound"


def test_abilities_are_none_or_an_object():
    sound, offset = Sound(), qpaged.get_quantizer("int8:token+offset")
    assert isinstance(sound.growth, qpaged.FitAgain)
    assert (sound.offset, sound.global_scale, sound.transform, sound.block_fit) == (None,) * 4
    assert offset.growth is None and offset.offset is not None
    assert qpaged.get_quantizer("nvfp4").global_scale.dtype == jnp.uint8
    rotated = qpaged.get_quantizer("int8:token+offset+rotate")
    assert rotated.transform is not None and rotated.offset is offset.offset
