"""CacheScales: the static scales of a cache, layer by layer, and their file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from qpaged._arguments import shown
from qpaged._files import read_json, write_whole
from qpaged.formats._contract import Quantizer

FILE_KIND, FILE_VERSION = "cache scales", 1  # the fields "qpaged" and "version" of a file
FIELDS = ("format", "key", "value")
SMALLEST, LARGEST = 2.0**-110, 2.0**112  # products with every 8-bit float are normal float32 numbers
CALIBRATE = "qpaged calibrate MODEL --text TEXT --out scales.json writes some"


@dataclass(frozen=True, eq=False)
class CacheScales:
    """The static scales of keys and values in every layer, which a cache takes by
    :meth:`~qpaged.PagedAttentionCache.with_scales`.

    Attributes:
        key: (layers,) or (layers, kv_heads) float32.
        value: likewise, of as many layers.
        format: the format that they were chosen for, without its granularity: ``"fp8_e4m3"``, or of keys and
            values apart, ``"fp8_e4m3+rotate/fp8_e4m3"``.

    Raises:
        TypeError: scales that are no numbers, or a format that is no string.
        ValueError: scales of another shape, that are not positive, or that are not finite.
    """

    key: np.ndarray
    value: np.ndarray
    format: str = "fp8_e4m3"

    def __post_init__(self) -> None:
        for name in ("key", "value"):
            scales = scale_values(name, getattr(self, name))
            if scales.ndim not in (1, 2) or not scales.size:
                raise ValueError(
                    f"{name} must have shape (layers,) or (layers, kv_heads), but came with shape "
                    f"{scales.shape}; give a scale for each layer."
                )
            object.__setattr__(self, name, scales)
        if len(self.key) != len(self.value):
            raise ValueError(
                f"key and value must be of as many layers, but came with {len(self.key)} and "
                f"{len(self.value)}; give both of each layer."
            )
        if not isinstance(self.format, str):
            raise TypeError(f"format must be a string, but got {shown(self.format)}; 'fp8_e4m3', say.")

    @property
    def layers(self) -> int:
        """The number of layers."""
        return len(self.key)

    def check_sizes(self, layers: int, kv_heads: int) -> None:
        """Raise ValueError unless the scales are of so many layers and KV heads, or of layers alone."""
        if self.layers != layers:
            raise ValueError(
                f"scales must be of the model's {layers} layers, but are of {self.layers}; read those of "
                f"this model."
            )
        for name in ("key", "value"):
            shape = getattr(self, name).shape
            if shape[1:] not in ((), (1,), (kv_heads,)):
                raise ValueError(
                    f"scales must be of the model's {kv_heads} KV heads, but those of the {name}s are of "
                    f"{shape[1]}; read those of this model."
                )

    @property
    def formats(self) -> tuple[str, str]:
        """The formats of keys and of values that the scales were chosen for."""
        key, _, value = self.format.partition("/")
        return key, value or key

    def save(self, path: str | Path) -> None:
        """Write the scales as JSON, which :meth:`load` reads: each float32 in full.

        Raises:
            OSError: the file cannot be written.
        """
        scales = {"format": self.format, "key": self.key.tolist(), "value": self.value.tolist()}
        text = json.dumps({"qpaged": FILE_KIND, "version": FILE_VERSION} | scales, indent=2) + "\n"
        write_whole(Path(path), text)

    @classmethod
    def load(cls, path: str | Path) -> "CacheScales":
        """Return the scales in a file that :meth:`save` or ``qpaged calibrate`` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it does not hold scales of this version.
        """
        data = read_json(Path(path), f"{CALIBRATE}.")
        is_ours = isinstance(data, Mapping) and data.get("qpaged") == FILE_KIND
        if not is_ours or data.get("version") != FILE_VERSION or not data.keys() >= set(FIELDS):
            raise ValueError(
                f"{path} must hold cache scales of version {FILE_VERSION}, but does not; {CALIBRATE}."
            )
        try:
            return cls(**{name: data[name] for name in FIELDS})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} holds scales that cannot be taken: {error}") from error


def scale_values(name: str, scales: ArrayLike) -> np.ndarray:
    """Return given scales as float32, or raise unless they are numbers that a scale can be."""
    try:
        values = np.asarray(scales)
        if values.dtype.kind not in "fiuV":  # ml_dtypes' floats are of the kind V
            raise TypeError(f"their dtype is {values.dtype}")
        values = values.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be scales, but got {shown(scales)} ({error}); give floats.") from error
    usable = (values >= SMALLEST) & (values <= LARGEST)
    if not usable.all():
        came = np.asarray(scales)[~usable].reshape(-1)[0]
        raise ValueError(
            f"{name} must be positive and finite scales, from 2^-110 to 2^112, but {came} came; {CALIBRATE}."
        )
    return values


def without_granularity(quantizer: Quantizer) -> str:
    """Return the spelling of a format without its granularity, "fp8_e4m3+rotate"."""
    name, *wrappers = str(quantizer).split("+")
    return "+".join([name.partition(":")[0], *wrappers])


def check_formats(scales: CacheScales, index: int, name: str, quantizer: Any) -> None:
    """Raise ValueError unless scales were chosen for a pool's format: those of keys have index 0."""
    chosen_for, pool_format = scales.formats[index], without_granularity(quantizer)
    if chosen_for != pool_format:
        raise ValueError(
            f"scales must be chosen for the format of the {name}, {pool_format}, but are for {chosen_for}; "
            f"qpaged calibrate --format {quantizer} chooses them."
        )
