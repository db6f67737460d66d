"""The backends of attention, and what each says to a call."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from qpaged._platforms import by_platform
from qpaged.attention import _gpu, _reference, _tpu, _xla
from qpaged.attention._options import Options, QueryTokens


@dataclass(frozen=True)
class AttentionBackend:
    """A backend of :func:`paged_attention`.

    Attributes:
        name: what ``backend=`` takes.
        platform: the one platform that it is compiled for; None for any.
        reason: why it declines; None where it does not.
    """

    name: str
    platform: str | None
    reason: str | None

    @property
    def available(self) -> bool:
        """Whether programs for its platform have it."""
        return self.reason is None


Attend = Callable[[QueryTokens, Any, Any, jax.Array | None, Options], jax.Array]
Refusal = Callable[[QueryTokens, Any, Any], str | None]


@dataclass(frozen=True)
class Entry:
    """A backend's name, the platform it is for, its attention, and what it says to a call, or to any.

    One that is ``by_name`` is taken only when it is asked for."""

    name: str
    platform: str | None
    attend: Attend
    call_refusal: Refusal = lambda *_: None
    refusal: Callable[[], str | None] = lambda: None
    by_name: bool = False


BACKENDS = {
    entry.name: entry
    for entry in (
        Entry("tpu", "tpu", _tpu.attend, _tpu.call_refusal, _tpu.refusal),
        Entry("gpu", "cuda", _gpu.attend, _gpu.call_refusal, _gpu.refusal, by_name=True),
        Entry("xla", None, _xla.attend),
        Entry("reference", None, _reference.attend),
    )
}
"""In the order in which they are chosen: the first that is for the platform and takes the call. The ``gpu``
kernel has not run on a chip yet, so that it is nobody's default."""


def listed(calls: Sequence[tuple[QueryTokens, Any, Any]]) -> tuple[AttentionBackend, ...]:
    """Every backend, with why it declines some of the ``calls``, or all."""
    return tuple(AttentionBackend(e.name, e.platform, reason(e, calls)) for e in BACKENDS.values())


def reason(entry: Entry, calls: Sequence[tuple[QueryTokens, Any, Any]]) -> str | None:
    """Why a backend declines some of the ``calls``, or all; None if it takes them."""
    said = entry.refusal()
    return said or next(filter(None, (entry.call_refusal(*call) for call in calls)), None)


def attend(
    tokens: QueryTokens, keys: Any, values: Any, sinks: jax.Array | None, options: Options
) -> jax.Array:
    """Attention on the first backend that is for the platform that the program is lowered for."""
    entries = [entry for entry in BACKENDS.values() if not entry.by_name]
    taken = [entry for entry in entries if reason(entry, [(tokens, keys, values)]) is None]
    anywhere = next(entry for entry in taken if entry.platform is None)
    somewhere = {e.platform: _with(e, options) for e in taken if e.platform is not None}
    if not somewhere:
        return anywhere.attend(tokens, keys, values, sinks, options)
    return by_platform(tokens, keys, values, sinks, default=_with(anywhere, options), **somewhere)


@functools.lru_cache(maxsize=256)
def _with(entry: Entry, options: Options) -> Callable[..., jax.Array]:
    """The same function for the same options, so that it is traced once."""
    return lambda tokens, keys, values, sinks: entry.attend(tokens, keys, values, sinks, options)
