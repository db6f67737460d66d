"""The backends of attention, and what each says to a call.

A new backend is a file with ``attend`` and, where it does not take every call, ``refusal`` and
``call_refusal``, and a line in :data:`IMPLEMENTATIONS`.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from qpaged._platforms import by_platform
from qpaged.attention import _cpu, _gpu, _reference, _tpu, _xla
from qpaged.attention._merge import Partial
from qpaged.attention._options import Options, QueryTokens, with_options
from qpaged.pools import Pages

logger = logging.getLogger("qpaged")


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


class AttentionCall(NamedTuple):
    """The arrays of one call, whose keys and values have no transform left.

    Attributes:
        tokens: the queries.
        keys: (kv_heads, pages, page_size, head_dim).
        values: likewise.
    """

    tokens: QueryTokens
    keys: Pages
    values: Pages


def takes_any_call(tokens: QueryTokens, keys: Pages, values: Pages) -> None:
    """Return None: there is no call that a backend of plain JAX declines."""


def is_always_there() -> None:
    """Return None: a backend of plain JAX needs nothing that may be missing."""


@dataclass(frozen=True)
class Implementation:
    """What a backend is made of.

    Attributes:
        name: what ``backend=`` takes.
        platform: the one platform that it is compiled for; None for any.
        attend: attention of query tokens over pages.
        call_refusal: returns why it does not take a call; None if it does.
        refusal: returns why it takes no call at all; None if it does.
        by_name_only: True if it is taken only when it is asked for.
    """

    name: str
    platform: str | None
    attend: Callable[[QueryTokens, Pages, Pages, Options], Partial]
    call_refusal: Callable[[QueryTokens, Pages, Pages], str | None] = takes_any_call
    refusal: Callable[[], str | None] = is_always_there
    by_name_only: bool = False


# In the order in which they are chosen: the first that is for the platform and takes the call. The gpu kernel
# has not run on a chip yet, so that it is nobody's default.
IMPLEMENTATIONS = (
    Implementation("tpu", "tpu", _tpu.attend, _tpu.call_refusal, _tpu.refusal),
    Implementation("gpu", "cuda", _gpu.attend, _gpu.call_refusal, _gpu.refusal, by_name_only=True),
    Implementation("cpu", "cpu", _cpu.attend, _cpu.call_refusal, _cpu.refusal),
    Implementation("xla", None, _xla.attend),
    Implementation("reference", None, _reference.attend),
)
BACKENDS = {implementation.name: implementation for implementation in IMPLEMENTATIONS}


def list_backends(calls: Sequence[AttentionCall]) -> tuple[AttentionBackend, ...]:
    """Return every backend, with why it declines some of the ``calls``, or all."""
    backends = []
    for implementation in IMPLEMENTATIONS:
        reason = decline_reason(implementation, calls)
        backends.append(AttentionBackend(implementation.name, implementation.platform, reason))
    return tuple(backends)


def decline_reason(implementation: Implementation, calls: Sequence[AttentionCall]) -> str | None:
    """Return why a backend declines some of the ``calls``, or all; None if it takes them."""
    reason = implementation.refusal()
    if reason is not None:
        return reason
    for call in calls:
        reason = implementation.call_refusal(*call)
        if reason is not None:
            return reason
    return None


def attend(call: AttentionCall, options: Options) -> Partial:
    """Return attention on the first backend that is for the platform that the program is lowered for."""
    default: Implementation | None = None
    kernels: dict[str, Any] = {}  # functions, by platform
    for implementation in IMPLEMENTATIONS:
        if implementation.by_name_only:
            continue
        reason = decline_reason(implementation, [call])
        if reason is not None:
            logger.debug("paged_attention: %s declines, it %s", implementation.name, reason)
            continue
        if implementation.platform is not None:
            kernels.setdefault(implementation.platform, with_options(implementation.attend, options))
        elif default is None:
            default = implementation
    assert default is not None  # xla takes every call
    platforms = ", ".join(kernels) or "no platform"
    logger.debug(
        "paged_attention of %s: kernel for %s, %s elsewhere", call.tokens.query.shape, platforms, default.name
    )
    if not kernels:
        return default.attend(*call, options)
    return by_platform(*call, default=with_options(default.attend, options), **kernels)


def attend_by_name(name: str, call: AttentionCall, options: Options) -> Partial:
    """Return attention on the backend of that name and no other.

    Raises:
        ValueError: the backend declines the call.
    """
    implementation = BACKENDS[name]
    reason = decline_reason(implementation, [call])
    if reason is not None:
        raise ValueError(
            f"backend must be one that takes the call, but {name!r} declines: it {reason}. "
            f"Leave it None for the first that does, or see qpaged.attention_backends."
        )
    return implementation.attend(*call, options)
