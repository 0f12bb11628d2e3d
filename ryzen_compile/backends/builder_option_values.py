"""Parsers and setters of builder options, from which the table in `builder_options.py` is composed."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

OptionValue = str | int | float | bool | list[str]
"""A parsed option value: JSON, as stored in a build request and in the manifest."""


class BuilderHandles(NamedTuple):
    """The TensorRT objects that options are applied to before the graph is parsed."""

    trt: Any
    """The module of the TensorRT bindings."""
    parser: Any
    """The `OnnxParser`."""
    config: Any
    """The `IBuilderConfig`."""


OptionParser = Callable[[str], OptionValue]
"""Parses the text of a value. Raises ValueError, which states the expected form, if it cannot be parsed."""
OptionSetter = Callable[[BuilderHandles, Any], object]
"""Applies a parsed value to the handles."""


def parse_switch(text: str) -> bool:
    """Parse the value of a switch, which is empty, `true` or `1`."""
    if text.lower() not in ("", "true", "1"):
        raise ValueError("the option is a switch and takes no value")
    return True


def int_range(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return a parser of integers from `low` to `high`; None: unbounded above."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]+", text) or int(text) < low or (high is not None and int(text) > high):
            raise ValueError(f"expected an integer {f'of at least {low}' if high is None else f'from {low} to {high}'}")
        return int(text)

    return parse


def one_of(*groups: tuple[str, ...]) -> Callable[[str], str]:
    """Return a parser of keywords, case-insensitive; each group is a canonical keyword followed by its synonyms."""
    canonical = {keyword.lower(): group[0] for group in groups for keyword in group}

    def parse(text: str) -> str:
        if text.lower() not in canonical:
            raise ValueError(f"expected one of {', '.join(group[0] for group in groups)}")
        return canonical[text.lower()]

    return parse


_UNITS = {"B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_memory_pools(text: str) -> list[str]:
    """Parse `workspace:4096,tacticSharedMem:48K`, in MiB without a suffix, into `workspace:4294967296`, ..., in bytes."""
    limits = []
    for part in text.split(","):
        pool, _, size = part.partition(":")
        match = re.fullmatch(r"([0-9]+\.?[0-9]*)([BKMG]?)", size.upper())
        if pool not in _MEMORY_POOLS or match is None:
            raise ValueError(
                f"expected POOL:SIZE with POOL one of {', '.join(_MEMORY_POOLS)} and SIZE in MiB or with a suffix B, K, M or G"
            )
        limits.append(f"{pool}:{int(float(match[1]) * _UNITS[match[2] or 'M'])}")
    return limits


_MEMORY_POOLS = {"workspace": "WORKSPACE", "tacticSharedMem": "TACTIC_SHARED_MEMORY"}
"""trtexec names of memory pools -> members of `MemoryPoolType`."""


def signed_names(names: Mapping[str, str]) -> Callable[[str], list[str]]:
    """Return a parser of `+NAME,-NAME`, with each NAME a key of `names`, case-insensitive."""

    def parse(text: str) -> list[str]:
        signed = text.split(",")
        for item in signed:
            if item[:1] not in ("+", "-") or item[1:].lower() not in {name.lower() for name in names}:
                raise ValueError(f"expected +NAME to add and -NAME to remove, with NAME one of {', '.join(names)}")
        return signed

    return parse


def parse_text(text: str) -> str:
    """Parse any non-empty text."""
    if not text:
        raise ValueError("the option takes a value")
    return text


def parse_library_paths(text: str) -> list[str]:
    """Parse a comma-separated list of existing files into absolute paths."""
    paths = [part for part in text.split(",") if part]
    if not paths:
        raise ValueError("expected the path of at least one file")
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise ValueError(f"there is no file {', '.join(f'`{path}`' for path in missing)}")
    return [os.path.abspath(path) for path in paths]


def set_builder_flags(*names: str) -> OptionSetter:
    """Return a setter of the members `names` of `BuilderFlag`."""

    def apply(handles: BuilderHandles, value: Any) -> None:
        for name in names:
            handles.config.set_flag(getattr(handles.trt.BuilderFlag, name))

    return apply


def set_config_attribute(name: str) -> OptionSetter:
    """Return a setter of the attribute `name` of the builder configuration."""
    return lambda handles, value: setattr(handles.config, name, value)


def set_config_enum(name: str, enum_name: str, members: Mapping[str, str]) -> OptionSetter:
    """Return a setter of a configuration attribute to the member of an enum; `members` maps option values to member names."""
    return lambda handles, value: setattr(handles.config, name, getattr(getattr(handles.trt, enum_name), members[value]))


def set_nothing(handles: BuilderHandles, value: Any) -> None:
    """Do nothing: the backend applies the option itself."""


def set_sparsity(handles: BuilderHandles, value: Any) -> None:
    """Enable kernels for 2:4 sparse weights if the value is `enable`."""
    if value == "enable":
        handles.config.set_flag(handles.trt.BuilderFlag.SPARSE_WEIGHTS)


def disable_tf32(handles: BuilderHandles, value: Any) -> None:
    """Disable TF32, which TensorRT enables by default."""
    handles.config.clear_flag(handles.trt.BuilderFlag.TF32)


def set_memory_pools(handles: BuilderHandles, value: Sequence[str]) -> None:
    """Limit memory pools, each given as `workspace:4294967296` in bytes."""
    for part in value:
        pool, _, size = part.partition(":")
        handles.config.set_memory_pool_limit(getattr(handles.trt.MemoryPoolType, _MEMORY_POOLS[pool]), int(size))


TACTIC_SOURCES = {"EDGE_MASK_CONVOLUTIONS": "EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS": "JIT_CONVOLUTIONS"}
"""trtexec names of tactic sources -> members of `TacticSource`."""


def set_tactic_sources(handles: BuilderHandles, value: Sequence[str]) -> None:
    """Add tactic sources to the default ones and remove tactic sources from them."""
    sources = handles.config.get_tactic_sources()
    for item in value:
        bit = 1 << int(getattr(handles.trt.TacticSource, TACTIC_SOURCES[item[1:].upper()]))
        sources = sources | bit if item[0] == "+" else sources & ~bit
    handles.config.set_tactic_sources(sources)


PREVIEW_FEATURES = {
    "aliasedPluginIO1003": "ALIASED_PLUGIN_IO_10_03",
    "runtimeActivationResize": "RUNTIME_ACTIVATION_RESIZE_10_10",
}
"""trtexec names of preview features -> members of `PreviewFeature`."""


def set_preview_features(handles: BuilderHandles, value: Sequence[str]) -> None:
    """Enable and disable preview features."""
    members = {name.lower(): member for name, member in PREVIEW_FEATURES.items()}
    for item in value:
        handles.config.set_preview_feature(getattr(handles.trt.PreviewFeature, members[item[1:].lower()]), item[0] == "+")


def use_instance_norm_plugin(handles: BuilderHandles, value: Any) -> None:
    """Let the parser import InstanceNormalization as a plugin."""
    handles.parser.clear_flag(handles.trt.OnnxParserFlag.NATIVE_INSTANCENORM)


def enable_plugin_override(handles: BuilderHandles, value: Any) -> None:
    """Let the parser prefer plugins to its own importers."""
    handles.parser.set_flag(handles.trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)


def load_static_plugins(handles: BuilderHandles, value: Sequence[str]) -> None:
    """Load libraries that register their plugins when they are loaded."""
    for path in value:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def load_dynamic_plugins(handles: BuilderHandles, value: Sequence[str]) -> None:
    """Load libraries through the plugin registry."""
    for path in value:
        handles.trt.get_plugin_registry().load_library(path)
