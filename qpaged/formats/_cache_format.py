"""CacheFormat: formats for keys and values apart, and layer by layer."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpaged._arguments import check_type, shown, whole_number
from qpaged._deprecated import renamed_argument
from qpaged._files import read_json, write_whole
from qpaged.formats._exact import PoolQuantizer, pool_quantizer, pool_quantizer_from_config
from qpaged.formats._registry import PLAIN, RegistryError, no_format

FILE_KIND, FILE_VERSION = "cache format", 1  # the fields "qpaged" and "version" of a file

Pair = tuple[PoolQuantizer | None, PoolQuantizer | None]


@dataclass(frozen=True)
class CacheFormat:
    """The formats of a cache: each a quantizer, or None for plain arrays of the logical dtype.

    Attributes:
        key: the format of keys.
        value: the format of values.
        layers: (layer index, (key format, value format)) for the layers that differ, ascending.
    """

    key: PoolQuantizer | None = None
    value: PoolQuantizer | None = None
    layers: tuple[tuple[int, Pair], ...] = ()

    def __post_init__(self) -> None:
        for name in ("key", "value"):
            rule, advice = "a qpaged.Quantizer or None", "CacheFormat.of takes spellings"
            check_type(name, getattr(self, name), PoolQuantizer | None, rule, advice)
        if not isinstance(self.layers, tuple) or not all(map(_is_layer, self.layers)):
            raise TypeError(
                f"layers must be a tuple of (layer, (key quantizer, value quantizer)), but got "
                f"{shown(self.layers)}; with_layers takes a mapping, as {{0: 'int4'}}."
            )
        indices = [index for index, _ in self.layers]
        if indices != sorted(set(indices)) or any(index < 0 for index in indices):
            raise ValueError(
                f"layers must be counted from 0, each once and ascending, but got layers {indices}; "
                f"with_layers sorts them."
            )

    @classmethod
    @renamed_argument("format", "quantizer")
    def of(cls, quantizer: Any) -> "CacheFormat":
        """Return the cache format that any accepted argument stands for.

        Args:
            quantizer: None or ``"plain"`` (plain arrays), a spelling (``"int8"``, or keys and values apart,
                ``"int8:channel/int8:token"``), the path of a file that :meth:`save` wrote (as a string it
                must end in ``.json``), a quantizer, or a cache format.

        Raises:
            RegistryError: a spelling that names no installed format.
            OSError, ValueError: a file that cannot be read, or that names no installed format.
            TypeError: anything else.
        """
        if isinstance(quantizer, CacheFormat):
            return quantizer
        if isinstance(quantizer, Path) or (isinstance(quantizer, str) and quantizer.endswith(".json")):
            return _load(Path(quantizer))
        if isinstance(quantizer, str):
            return cls(*_pair_of_spelling(quantizer))
        if quantizer is None or isinstance(quantizer, PoolQuantizer):
            return cls(quantizer, quantizer)
        raise no_format(
            quantizer,
            "None, a spelling such as 'int8:token', the path of a .json file, a qpaged.Quantizer or a "
            "qpaged.CacheFormat",
        )

    def with_layers(self, formats: Mapping[int, Any]) -> "CacheFormat":
        """Return this format with others in the given layers, as ``{0: "raw", 3: "int8/int8:token"}``.

        Raises:
            TypeError: no mapping, or a layer that is no integer.
            ValueError: a negative layer, or a format for a layer that itself differs by layer.
        """
        check_type("formats", formats, Mapping, "a mapping from layers to formats", "give {0: 'raw'}, say")
        pairs = dict(self.layers)
        for layer, layer_format in formats.items():
            index = whole_number("the number of a layer", layer)
            pairs[index] = _pair_of_layer(index, layer_format)
        return CacheFormat(self.key, self.value, tuple(sorted(pairs.items())))

    def layer(self, index: int) -> Pair:
        """Return the formats of keys and of values in layer ``index``."""
        return dict(self.layers).get(index, (self.key, self.value))

    @property
    def config(self) -> dict[str, Any]:
        """Everything that makes this format, as plain JSON; null for plain arrays."""
        layers = [[index, [_config(part) for part in pair]] for index, pair in self.layers]
        return {"key": _config(self.key), "value": _config(self.value), "layers": layers}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "CacheFormat":
        """Return the format that :attr:`config` describes.

        Raises:
            ValueError: a part is missing or malformed.
        """
        missing = [name for name in ("key", "value", "layers") if name not in config]
        if missing:
            raise ValueError(
                f"config lacks {', '.join(missing)}; give key, value and layers, as CacheFormat.config does."
            )
        key, value = _from_config(config["key"]), _from_config(config["value"])
        layers: dict[int, CacheFormat] = {}
        try:
            for index, (layer_key, layer_value) in config["layers"]:
                layers[_new_layer(index, layers)] = cls(_from_config(layer_key), _from_config(layer_value))
        except RegistryError:
            raise
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"layers must list [index, [key, value]] of each layer once, but came as "
                f"{config['layers']!r:.80}."
            ) from error
        return cls(key, value).with_layers(layers)  # which sorts them, and refuses negative ones

    def save(self, path: str | Path) -> None:
        """Write the format as JSON, which :meth:`of` and so everything that takes a format reads.

        Raises:
            OSError: the file cannot be written.
        """
        text = json.dumps({"qpaged": FILE_KIND, "version": FILE_VERSION} | self.config, indent=2) + "\n"
        write_whole(Path(path), text)

    def __str__(self) -> str:
        """Return the spelling; with layers, a description for people, which :meth:`of` does not read."""
        key, value = _spell(self.key), _spell(self.value)
        spelling = key if key == value else f"{key}/{value}"
        if not self.layers:
            return spelling
        layers = "; ".join(f"{index}: {_spell(key)}/{_spell(value)}" for index, (key, value) in self.layers)
        return f"{spelling} ({layers})"


def _pair_of_spelling(spelling: str) -> Pair:
    """Return the formats of keys and of values that ``key/value``, or one spelling for both, stands for."""
    parts = spelling.split("/")
    if len(parts) > 2:
        raise RegistryError(f"{spelling!r} is no format; write KEYS/VALUES with one slash, as int8/int4.")
    if len(parts) == 2 and "" in parts:
        raise RegistryError(f"{spelling!r} must have a format on both sides of its slash, as int8/int4.")
    return _quantizer_or_plain(parts[0]), _quantizer_or_plain(parts[-1])


def _quantizer_or_plain(spelling: str) -> PoolQuantizer | None:
    return None if spelling == PLAIN else pool_quantizer(spelling)


def _load(path: Path) -> CacheFormat:
    """Return the format in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file does not hold a cache format of this version.
    """
    try:
        config = read_json(path, "Write it with CacheFormat.save or qpaged tune.")
    except OSError as error:
        raise OSError(
            error.errno,
            f"quantizer names a file that cannot be read: {error.strerror}; CacheFormat.save and qpaged tune "
            f"write such files",
            str(path),
        ) from error
    if not isinstance(config, dict) or config.get("qpaged") != FILE_KIND:
        raise ValueError(
            f"{path} does not hold a cache format; write one with CacheFormat.save or qpaged tune."
        )
    if config.get("version") != FILE_VERSION:
        raise ValueError(
            f"{path} must be of version {FILE_VERSION}, but is of version {config.get('version')!r}; "
            f"read it with the qpaged that wrote it."
        )
    try:
        return CacheFormat.from_config(config)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds a cache format that cannot be made: {error}") from error


def _new_layer(index: Any, layers: Mapping[int, CacheFormat]) -> int:
    """Return a layer's index as it stands in a configuration, or raise ValueError if it can be none."""
    if type(index) is not int or index in layers:
        raise ValueError(f"layers must be named by integers, each once, but got {index!r}.")
    return index


def _pair_of_layer(index: int, quantizer: Any) -> Pair:
    """Return the formats of keys and of values that one layer is given."""
    if index < 0:
        raise ValueError(f"layers must be counted from 0, but got {index}; give the layer's own index.")
    both = CacheFormat.of(quantizer)
    if both.layers:
        raise ValueError(f"layer {index} must have one format, but came with formats by layer: {both}.")
    return both.key, both.value


def _is_layer(entry: object) -> bool:
    """Return True for (layer, (key format, value format))."""
    match entry:
        case tuple((int(), tuple((key, value)))):
            return isinstance(key, PoolQuantizer | None) and isinstance(value, PoolQuantizer | None)
    return False


def _spell(quantizer: PoolQuantizer | None) -> str:
    return PLAIN if quantizer is None else str(quantizer)


def _config(quantizer: PoolQuantizer | None) -> dict[str, Any] | None:
    return None if quantizer is None else quantizer.config


def _from_config(config: Any) -> PoolQuantizer | None:
    return None if config is None else pool_quantizer_from_config(config)
