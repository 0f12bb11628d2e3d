"""What the values of builder options look like, and what they set: the words that the table of `options.py` is written in."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

OptionValue = str | int | float | bool | list[str]
"""What an option may hold once it is read: JSON, as it goes into a request and into the manifest."""


class BuilderHandles(NamedTuple):
    """What options are set on, before the graph is parsed."""

    trt: Any
    """The module of TensorRT's bindings."""
    parser: Any
    config: Any


OptionParser = Callable[[str], OptionValue]
"""Reads a value; raises ValueError that says what it should be."""
OptionSetter = Callable[[BuilderHandles, Any], object]
"""Sets a value that was read."""


def parse_switch(text: str) -> bool:
    """Read the nothing that follows a switch."""
    if text.lower() not in ("", "true", "1"):
        raise ValueError("it is a switch and takes no value")
    return True


def int_range(low: int, high: int | None = None) -> Callable[[str], int]:
    """Read a whole number from `low` to `high`."""

    def read(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]+", text) or int(text) < low or (high is not None and int(text) > high):
            raise ValueError(f"it takes a whole number from {low}{'' if high is None else f' to {high}'}")
        return int(text)

    return read


def one_of(*groups: tuple[str, ...]) -> Callable[[str], str]:
    """Read one of some words; each group is a canonical word and those that mean the same."""
    meaning = {word.lower(): group[0] for group in groups for word in group}

    def read(text: str) -> str:
        if text.lower() not in meaning:
            raise ValueError(f"it takes one of {', '.join(group[0] for group in groups)}")
        return meaning[text.lower()]

    return read


_UNITS = {"B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_memory_pools(text: str) -> list[str]:
    """Read `workspace:4096,tacticSharedMem:48K`: MiB without a suffix. Returns `workspace:4294967296`, ..., in bytes."""
    found = []
    for part in text.split(","):
        pool, _, size = part.partition(":")
        match = re.fullmatch(r"([0-9]+\.?[0-9]*)([BKMG]?)", size.upper())
        if pool not in _MEMORY_POOLS or match is None:
            raise ValueError(f"it takes POOL:SIZE, POOL one of {', '.join(_MEMORY_POOLS)}, SIZE in MiB or with B, K, M or G")
        found.append(f"{pool}:{int(float(match[1]) * _UNITS[match[2] or 'M'])}")
    return found


_MEMORY_POOLS = {"workspace": "WORKSPACE", "tacticSharedMem": "TACTIC_SHARED_MEMORY"}


def signed_names(names: Mapping[str, str]) -> Callable[[str], list[str]]:
    """Read `+NAME,-NAME` of the names in `words`."""

    def read(text: str) -> list[str]:
        found = text.split(",")
        for word in found:
            if word[:1] not in ("+", "-") or word[1:].lower() not in {known.lower() for known in names}:
                raise ValueError(f"it takes +NAME to add and -NAME to remove, NAME one of {', '.join(names)}")
        return found

    return read


def parse_text(text: str) -> str:
    """Read anything but nothing."""
    if not text:
        raise ValueError("it takes a value")
    return text


def parse_library_paths(text: str) -> list[str]:
    """Read paths of files that are there, and make them absolute."""
    found = [part for part in text.split(",") if part]
    missing = [path for path in found if not os.path.isfile(path)]
    if missing or not found:
        raise ValueError(f"there is no file {', '.join(f'`{path}`' for path in missing) or 'named'}")
    return [os.path.abspath(path) for path in found]


def set_builder_flags(*names: str) -> OptionSetter:
    """Set builder flags."""

    def set_(at: BuilderHandles, value: Any) -> None:
        for name in names:
            at.config.set_flag(getattr(at.trt.BuilderFlag, name))

    return set_


def set_config_attribute(name: str) -> OptionSetter:
    """Set an attribute of the configuration to the value."""
    return lambda at, value: setattr(at.config, name, value)


def set_config_enum(name: str, enum_name: str, members: Mapping[str, str]) -> OptionSetter:
    """Set an attribute of the configuration to the member of an enum that the value stands for."""
    return lambda at, value: setattr(at.config, name, getattr(getattr(at.trt, enum_name), members[value]))


def set_nothing(handles: BuilderHandles, value: Any) -> None:
    """Set nothing: what the option asks for is always so."""


def set_sparsity(handles: BuilderHandles, value: Any) -> None:
    """Let kernels for sparse weights compete."""
    if value == "enable":
        handles.config.set_flag(handles.trt.BuilderFlag.SPARSE_WEIGHTS)


def disable_tf32(handles: BuilderHandles, value: Any) -> None:
    """Take TF32 away, which is on by default."""
    handles.config.clear_flag(handles.trt.BuilderFlag.TF32)


def set_memory_pools(handles: BuilderHandles, value: Sequence[str]) -> None:
    """Bound memory pools: `workspace:4294967296`, in bytes."""
    for part in value:
        pool, _, size = part.partition(":")
        handles.config.set_memory_pool_limit(getattr(handles.trt.MemoryPoolType, _MEMORY_POOLS[pool]), int(size))


TACTIC_SOURCES = {"EDGE_MASK_CONVOLUTIONS": "EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS": "JIT_CONVOLUTIONS"}
"""trtexec's names of the sources of tactics -> those of the bindings."""


def set_tactic_sources(handles: BuilderHandles, value: Sequence[str]) -> None:
    """Add and remove sources of tactics, starting from the default ones."""
    sources = handles.config.get_tactic_sources()
    for word in value:
        bit = 1 << int(getattr(handles.trt.TacticSource, TACTIC_SOURCES[word[1:].upper()]))
        sources = sources | bit if word[0] == "+" else sources & ~bit
    handles.config.set_tactic_sources(sources)


PREVIEW_FEATURES = {
    "aliasedPluginIO1003": "ALIASED_PLUGIN_IO_10_03",
    "runtimeActivationResize": "RUNTIME_ACTIVATION_RESIZE_10_10",
}
"""trtexec's names of the preview features -> those of the bindings."""


def set_preview_features(handles: BuilderHandles, value: Sequence[str]) -> None:
    """Switch preview features on and off."""
    names = {known.lower(): member for known, member in PREVIEW_FEATURES.items()}
    for word in value:
        handles.config.set_preview_feature(getattr(handles.trt.PreviewFeature, names[word[1:].lower()]), word[0] == "+")


def use_instance_norm_plugin(handles: BuilderHandles, value: Any) -> None:
    """Let the parser use a plugin for InstanceNormalization."""
    handles.parser.clear_flag(handles.trt.OnnxParserFlag.NATIVE_INSTANCENORM)


def enable_plugin_override(handles: BuilderHandles, value: Any) -> None:
    """Let the parser prefer plugins to its own import of an op."""
    handles.parser.set_flag(handles.trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)


def load_static_plugins(handles: BuilderHandles, value: Sequence[str]) -> None:
    """Load libraries that register their plugins themselves."""
    for path in value:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def load_dynamic_plugins(handles: BuilderHandles, value: Sequence[str]) -> None:
    """Load libraries through the plugin registry."""
    for path in value:
        handles.trt.get_plugin_registry().load_library(path)
