"""What the values of builder options look like, and what they set: the words that the table of `options.py` is written in."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Value = str | int | float | bool | list[str]
"""What an option may hold once it is read: JSON, as it goes into a request and into the manifest."""


class Settings(NamedTuple):
    """What options are set on, before the graph is parsed."""

    trt: Any
    """The module of TensorRT's bindings."""
    parser: Any
    config: Any


Reader = Callable[[str], Value]
"""Reads a value; raises ValueError that says what it should be."""
Setter = Callable[[Settings, Any], object]
"""Sets a value that was read."""


def switch(text: str) -> bool:
    """Read the nothing that follows a switch."""
    if text.lower() not in ("", "true", "1"):
        raise ValueError("it is a switch and takes no value")
    return True


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """Read a whole number from `low` to `high`."""

    def read(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]+", text) or int(text) < low or (high is not None and int(text) > high):
            raise ValueError(f"it takes a whole number from {low}{'' if high is None else f' to {high}'}")
        return int(text)

    return read


def choice(*groups: tuple[str, ...]) -> Callable[[str], str]:
    """Read one of some words; each group is a canonical word and those that mean the same."""
    meaning = {word.lower(): group[0] for group in groups for word in group}

    def read(text: str) -> str:
        if text.lower() not in meaning:
            raise ValueError(f"it takes one of {', '.join(group[0] for group in groups)}")
        return meaning[text.lower()]

    return read


_UNITS = {"B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def pools(text: str) -> list[str]:
    """Read `workspace:4096,tacticSharedMem:48K`: MiB without a suffix. Returns `workspace:4294967296`, ..., in bytes."""
    found = []
    for part in text.split(","):
        pool, _, size = part.partition(":")
        match = re.fullmatch(r"([0-9]+\.?[0-9]*)([BKMG]?)", size.upper())
        if pool not in _POOLS or match is None:
            raise ValueError(f"it takes POOL:SIZE, POOL one of {', '.join(_POOLS)}, SIZE in MiB or with B, K, M or G")
        found.append(f"{pool}:{int(float(match[1]) * _UNITS[match[2] or 'M'])}")
    return found


_POOLS = {"workspace": "WORKSPACE", "tacticSharedMem": "TACTIC_SHARED_MEMORY"}


def signed(words: Mapping[str, str]) -> Callable[[str], list[str]]:
    """Read `+NAME,-NAME` of the names in `words`."""

    def read(text: str) -> list[str]:
        found = text.split(",")
        for word in found:
            if word[:1] not in ("+", "-") or word[1:].lower() not in {known.lower() for known in words}:
                raise ValueError(f"it takes +NAME to add and -NAME to remove, NAME one of {', '.join(words)}")
        return found

    return read


def word(text: str) -> str:
    """Read anything but nothing."""
    if not text:
        raise ValueError("it takes a value")
    return text


def libraries(text: str) -> list[str]:
    """Read paths of files that are there, and make them absolute."""
    found = [part for part in text.split(",") if part]
    missing = [path for path in found if not os.path.isfile(path)]
    if missing or not found:
        raise ValueError(f"there is no file {', '.join(f'`{path}`' for path in missing) or 'named'}")
    return [os.path.abspath(path) for path in found]


def flag(*names: str) -> Setter:
    """Set builder flags."""

    def set_(at: Settings, value: Any) -> None:
        for name in names:
            at.config.set_flag(getattr(at.trt.BuilderFlag, name))

    return set_


def attribute(name: str) -> Setter:
    """Set an attribute of the configuration to the value."""
    return lambda at, value: setattr(at.config, name, value)


def member(name: str, enum: str, members: Mapping[str, str]) -> Setter:
    """Set an attribute of the configuration to the member of an enum that the value stands for."""
    return lambda at, value: setattr(at.config, name, getattr(getattr(at.trt, enum), members[value]))


def nothing(at: Settings, value: Any) -> None:
    """Set nothing: what the option asks for is always so."""


def set_sparsity(at: Settings, value: Any) -> None:
    """Let kernels for sparse weights compete."""
    if value == "enable":
        at.config.set_flag(at.trt.BuilderFlag.SPARSE_WEIGHTS)


def set_no_tf32(at: Settings, value: Any) -> None:
    """Take TF32 away, which is on by default."""
    at.config.clear_flag(at.trt.BuilderFlag.TF32)


def set_pools(at: Settings, value: Sequence[str]) -> None:
    """Bound memory pools: `workspace:4294967296`, in bytes."""
    for part in value:
        pool, _, size = part.partition(":")
        at.config.set_memory_pool_limit(getattr(at.trt.MemoryPoolType, _POOLS[pool]), int(size))


TACTICS = {"EDGE_MASK_CONVOLUTIONS": "EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS": "JIT_CONVOLUTIONS"}
"""trtexec's names of the sources of tactics -> those of the bindings."""


def set_tactics(at: Settings, value: Sequence[str]) -> None:
    """Add and remove sources of tactics, starting from the default ones."""
    sources = at.config.get_tactic_sources()
    for word in value:
        bit = 1 << int(getattr(at.trt.TacticSource, TACTICS[word[1:].upper()]))
        sources = sources | bit if word[0] == "+" else sources & ~bit
    at.config.set_tactic_sources(sources)


PREVIEWS = {
    "aliasedPluginIO1003": "ALIASED_PLUGIN_IO_10_03",
    "runtimeActivationResize": "RUNTIME_ACTIVATION_RESIZE_10_10",
}
"""trtexec's names of the preview features -> those of the bindings."""


def set_previews(at: Settings, value: Sequence[str]) -> None:
    """Switch preview features on and off."""
    names = {known.lower(): member for known, member in PREVIEWS.items()}
    for word in value:
        at.config.set_preview_feature(getattr(at.trt.PreviewFeature, names[word[1:].lower()]), word[0] == "+")


def set_instance_norm(at: Settings, value: Any) -> None:
    """Let the parser use a plugin for InstanceNormalization."""
    at.parser.clear_flag(at.trt.OnnxParserFlag.NATIVE_INSTANCENORM)


def set_plugin_override(at: Settings, value: Any) -> None:
    """Let the parser prefer plugins to its own import of an op."""
    at.parser.set_flag(at.trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)


def load_static(at: Settings, value: Sequence[str]) -> None:
    """Load libraries that register their plugins themselves."""
    for path in value:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def load_dynamic(at: Settings, value: Sequence[str]) -> None:
    """Load libraries through the plugin registry."""
    for path in value:
        at.trt.get_plugin_registry().load_library(path)
