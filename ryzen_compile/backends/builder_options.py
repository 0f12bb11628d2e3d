"""Builder options under their trtexec names: the values each accepts, what it sets, and the backends that do not support it.

The command line, the validation before a build and the child process that builds share one table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ryzen_compile import registry
from ryzen_compile.backends import builder_option_values as option_values
from ryzen_compile.backends.builder_option_values import BuilderHandles, OptionParser, OptionSetter, OptionValue
from ryzen_compile.errors import BackendError, UsageError, did_you_mean

if TYPE_CHECKING:
    from ryzen_compile.spec.dtypes import Precision


@dataclass(frozen=True, kw_only=True)
class BuilderOption:
    """One builder option."""

    name: str
    description: str
    metavar: str | None = None
    """The placeholder of the value in the help; None: the option is a switch."""
    parse: OptionParser
    apply: OptionSetter
    aliases: tuple[str, ...] = ()
    """Other names of the option with the same values: the short names of trtexec, the names of Polygraphy."""
    unsupported_backends: Mapping[str, str] = field(default_factory=dict)
    """{backend name: reason} of the backends that do not support the option."""


@dataclass(frozen=True, kw_only=True)
class PrecisionFlag:
    """A precision flag of trtexec before TensorRT 11; since then every layer computes in the types of the graph."""

    name: str
    description: str
    precision: Precision | None = None
    """The precision that the flag requests; None: the flag has no effect or is refused."""
    refused: bool = False
    """Whether the flag requests a precision that no pass provides."""


def parse_options(backend: str, raw_options: Mapping[str, str]) -> dict[str, OptionValue]:
    """Parse options given as {name without dashes: text, empty for a switch} and return {trtexec name: value}.

    Raises UsageError for an unknown backend, an unknown or repeated name, or a value that cannot be parsed, BackendError for an
    option that `backend` does not support.
    """
    traits = registry.find_backend(backend).traits
    no_options = None if traits.accepts_builder_options else _NO_OPTIONS if traits.compiles else _NO_ENGINE_BUILD
    options_by_name = {name: option for option in OPTIONS for name in (option.name, *option.aliases)}
    values: dict[str, OptionValue] = {}
    for name, text in raw_options.items():
        if name in OPTION_ALTERNATIVES:
            raise UsageError(f"`--{name}` is not a builder option of ryzen-compile", hint=OPTION_ALTERNATIVES[name])
        if name not in options_by_name:
            raise UsageError(f"there is no builder option `--{name}`", hint=did_you_mean(name, sorted(options_by_name)))
        option = options_by_name[name]
        if option.name in values:
            raise UsageError(f"`--{option.name}` is given twice", hint="give it once")
        reason = no_options or option.unsupported_backends.get(backend)
        if reason:
            raise BackendError(f"`{backend}` does not support `--{name}`: {reason}", hint=f"remove `--{name}`")
        try:
            values[option.name] = option.parse(text.strip())
        except ValueError as error:
            raise UsageError(f"`--{name}={text}`: {error}", hint=option.description) from error
    return values


def apply_options(options: Mapping[str, OptionValue], handles: BuilderHandles) -> None:
    """Apply parsed options to the handles."""
    by_name = {option.name: option for option in OPTIONS}
    for name, value in options.items():
        by_name[name].apply(handles, value)


_NO_OPTIONS = "the backend has no builder options"
_NO_ENGINE_BUILD = "the backend runs the graph itself and builds no engine"
_NO_TIMING_CACHE = {"tensorrt-rtx": "TensorRT-RTX has no timing cache"}
_NEEDS_GPU = {"tensorrt-rtx": "TensorRT-RTX supports it only on a machine with a GPU, not in builds ahead of time"}
_NO_LEAN_RUNTIME = {"tensorrt-rtx": "the option needs the lean runtime, which TensorRT-RTX does not ship"}
_NO_PLUGINS = {"tensorrt-rtx": "NVIDIA does not support plugins in TensorRT-RTX"}

OPTIONS: tuple[BuilderOption, ...] = (
    BuilderOption(
        name="builderOptimizationLevel",
        description="search effort of the builder, from 0 to 5 (default 3)",
        metavar="0..5",
        parse=option_values.int_range(0, 5),
        apply=option_values.set_config_attribute("builder_optimization_level"),
        aliases=("builder-optimization-level",),
    ),
    BuilderOption(
        name="memPoolSize",
        description="memory limit of a pool: workspace:4096 in MiB, or workspace:512K with the suffix B, K, M or G",
        metavar="POOL:SIZE,...",
        parse=option_values.parse_memory_pools,
        apply=option_values.set_memory_pools,
    ),
    BuilderOption(
        name="timingCacheFile",
        description="read tactic timings from this file, and write new ones to it",
        metavar="FILE",
        parse=option_values.parse_text,
        apply=option_values.set_nothing,  # `TensorRTBuilder` reads and writes the file before and after the build
        unsupported_backends=_NO_TIMING_CACHE,
    ),
    BuilderOption(
        name="noBuilderCache",
        description="disable the timing cache",
        parse=option_values.parse_switch,
        apply=option_values.set_builder_flags("DISABLE_TIMING_CACHE"),
        unsupported_backends=_NO_TIMING_CACHE,
    ),
    BuilderOption(
        name="noCompilationCache",
        description="disable the compilation cache, which is part of the timing cache",
        parse=option_values.parse_switch,
        apply=option_values.set_builder_flags("DISABLE_COMPILATION_CACHE"),
        aliases=("disable-compilation-cache",),
        unsupported_backends=_NO_TIMING_CACHE,
    ),
    BuilderOption(
        name="errorOnTimingCacheMiss",
        description="fail if a tactic is missing in the timing cache, instead of timing it",
        parse=option_values.parse_switch,
        apply=option_values.set_builder_flags("ERROR_ON_TIMING_CACHE_MISS"),
        aliases=("error-on-timing-cache-miss",),
        unsupported_backends=_NO_TIMING_CACHE,
    ),
    BuilderOption(
        name="versionCompatible",
        description="build an engine that later versions of TensorRT can load too",
        parse=option_values.parse_switch,
        apply=option_values.set_builder_flags("VERSION_COMPATIBLE"),
        aliases=("vc", "version-compatible"),
        unsupported_backends=_NO_LEAN_RUNTIME,
    ),
    BuilderOption(
        name="excludeLeanRuntime",
        description="exclude the lean runtime from a version-compatible engine",
        parse=option_values.parse_switch,
        apply=option_values.set_builder_flags("EXCLUDE_LEAN_RUNTIME"),
        aliases=("exclude-lean-runtime",),
        unsupported_backends=_NO_LEAN_RUNTIME,
    ),
    BuilderOption(
        name="hardwareCompatibilityLevel",
        description="build an engine that runs on other GPUs too: none, ampere+ or sameComputeCapability",
        metavar="LEVEL",
        parse=option_values.one_of(("none",), ("ampere+", "ampere_plus"), ("sameComputeCapability", "same_compute_capability")),
        apply=option_values.set_config_enum(
            "hardware_compatibility_level",
            "HardwareCompatibilityLevel",
            {"none": "NONE", "ampere+": "AMPERE_PLUS", "sameComputeCapability": "SAME_COMPUTE_CAPABILITY"},
        ),
        aliases=("hardware-compatibility-level",),
        unsupported_backends={"tensorrt-rtx": "one plan contains several targets instead: list them in --gpu"},
    ),
    BuilderOption(
        name="stripWeights",
        description="exclude the weights from the engine; they are supplied when it is loaded",
        parse=option_values.parse_switch,
        apply=option_values.set_builder_flags("STRIP_PLAN"),
        aliases=("strip-plan",),
        unsupported_backends=_NEEDS_GPU,
    ),
    BuilderOption(
        name="stripAllWeights",
        description="same as --refit --stripWeights",
        parse=option_values.parse_switch,
        apply=option_values.set_builder_flags("REFIT", "STRIP_PLAN"),
        unsupported_backends=_NEEDS_GPU,
    ),
    BuilderOption(
        name="refit",
        description="allow the weights of the engine to be replaced",
        parse=option_values.parse_switch,
        apply=option_values.set_builder_flags("REFIT"),
        aliases=("refittable",),
        unsupported_backends=_NEEDS_GPU,
    ),
    BuilderOption(
        name="allowWeightStreaming",
        description="allow weights to stay in host memory and be streamed to the GPU",
        parse=option_values.parse_switch,
        apply=option_values.set_builder_flags("WEIGHT_STREAMING"),
        aliases=("weight-streaming",),
    ),
    BuilderOption(
        name="sparsity",
        description="disable or enable kernels for weights with 2:4 sparsity",
        metavar="disable|enable",
        parse=option_values.one_of(("disable",), ("enable",)),
        apply=option_values.set_sparsity,
    ),
    BuilderOption(
        name="noTF32",
        description="compute float32 without TF32, which has a shorter mantissa",
        parse=option_values.parse_switch,
        apply=option_values.disable_tf32,
    ),
    BuilderOption(
        name="maxAuxStreams",
        description="maximum number of auxiliary streams per inference",
        metavar="N",
        parse=option_values.int_range(0),
        apply=option_values.set_config_attribute("max_aux_streams"),
        aliases=("max-aux-streams",),
    ),
    BuilderOption(
        name="tilingOptimizationLevel",
        description="search effort for tilings that stay in the L2 cache: 0 none, 1 fast, 2 moderate, 3 full",
        metavar="0..3",
        parse=option_values.one_of(("0", "none"), ("1", "fast"), ("2", "moderate"), ("3", "full")),
        apply=option_values.set_config_enum(
            "tiling_optimization_level",
            "TilingOptimizationLevel",
            {"0": "NONE", "1": "FAST", "2": "MODERATE", "3": "FULL"},
        ),
        aliases=("tiling-optimization-level",),
    ),
    BuilderOption(
        name="l2LimitForTiling",
        description="maximum number of bytes of the L2 cache that tilings may use",
        metavar="BYTES",
        parse=option_values.int_range(0),
        apply=option_values.set_config_attribute("l2_limit_for_tiling"),
    ),
    BuilderOption(
        name="maxTactics",
        description="maximum number of tactics to time per layer; -1: the builder decides",
        metavar="N",
        parse=option_values.int_range(-1),
        apply=option_values.set_config_attribute("max_num_tactics"),
    ),
    BuilderOption(
        name="avgTiming",
        description="number of runs that are averaged to time a tactic",
        metavar="N",
        parse=option_values.int_range(1),
        apply=option_values.set_config_attribute("avg_timing_iterations"),
    ),
    BuilderOption(
        name="profilingVerbosity",
        description="layer information in the engine; the report on precision and fusion needs detailed (the default)",
        metavar="MODE",
        parse=option_values.one_of(("detailed",), ("layer_names_only",), ("none",)),
        apply=option_values.set_config_enum(
            "profiling_verbosity",
            "ProfilingVerbosity",
            {"detailed": "DETAILED", "layer_names_only": "LAYER_NAMES_ONLY", "none": "NONE"},
        ),
        aliases=("profiling-verbosity",),
    ),
    BuilderOption(
        name="tacticSources",
        description="add or remove tactic sources: -JIT_CONVOLUTIONS",
        metavar="+|-NAME,...",
        parse=option_values.signed_names(option_values.TACTIC_SOURCES),
        apply=option_values.set_tactic_sources,
    ),
    BuilderOption(
        name="preview",
        description="enable or disable preview features: +runtimeActivationResize",
        metavar="+|-NAME,...",
        parse=option_values.signed_names(option_values.PREVIEW_FEATURES),
        apply=option_values.set_preview_features,
    ),
    BuilderOption(
        name="distributiveIndependence",
        description="make the result of each row of a batch bitwise independent of the other rows",
        parse=option_values.parse_switch,
        apply=option_values.set_builder_flags("DISTRIBUTIVE_INDEPENDENCE"),
    ),
    BuilderOption(
        name="directIO",
        description="avoid reformatting of network inputs and outputs",
        parse=option_values.parse_switch,
        apply=option_values.set_builder_flags("DIRECT_IO"),
        aliases=("direct-io",),
    ),
    BuilderOption(
        name="setBuildRoute",
        description="build route: the compiler settings found by the trtexec tuner",
        metavar="ROUTE",
        parse=option_values.parse_text,
        apply=option_values.set_config_attribute("build_route"),
        unsupported_backends={"tensorrt-rtx": "TensorRT-RTX has no build routes"},
    ),
    BuilderOption(
        name="pluginInstanceNorm",
        description="import InstanceNormalization as a plugin",
        parse=option_values.parse_switch,
        apply=option_values.use_instance_norm_plugin,
        aliases=("pi",),
        unsupported_backends=_NO_PLUGINS,
    ),
    BuilderOption(
        name="enablePluginOverride",
        description="prefer plugins to the parser's own importers",
        parse=option_values.parse_switch,
        apply=option_values.enable_plugin_override,
        unsupported_backends=_NO_PLUGINS,
    ),
    BuilderOption(
        name="staticPlugins",
        description="plugin libraries to load",
        metavar="FILE,...",
        parse=option_values.parse_library_paths,
        apply=option_values.load_static_plugins,
        unsupported_backends=_NO_PLUGINS,
    ),
    BuilderOption(
        name="dynamicPlugins",
        description="plugin libraries to load through the plugin registry",
        metavar="FILE,...",
        parse=option_values.parse_library_paths,
        apply=option_values.load_dynamic_plugins,
        unsupported_backends=_NO_PLUGINS,
    ),
    BuilderOption(
        name="setPluginsToSerialize",
        description="plugin libraries to embed in the engine",
        metavar="FILE,...",
        parse=option_values.parse_library_paths,
        apply=option_values.set_config_attribute("plugins_to_serialize"),
        unsupported_backends=_NO_PLUGINS,
    ),
)

_STRONGLY_TYPED = "TensorRT 11 computes in the types of the graph"
_NEEDS_QDQ_NODES = "the graph must contain QuantizeLinear and DequantizeLinear nodes; NVIDIA ModelOpt writes such graphs"

PRECISION_FLAGS: tuple[PrecisionFlag, ...] = (
    PrecisionFlag(name="fp16", precision="fp16", description=_STRONGLY_TYPED),
    PrecisionFlag(name="bf16", precision="bf16", description=_STRONGLY_TYPED),
    PrecisionFlag(
        name="best",
        precision="fp16",
        description=f"{_STRONGLY_TYPED}; fp16 is the fastest precision that needs no calibration",
    ),
    PrecisionFlag(name="stronglyTyped", description="no effect: every network is strongly typed since TensorRT 11"),
    PrecisionFlag(name="int8", refused=True, description=_NEEDS_QDQ_NODES),
    PrecisionFlag(name="fp8", refused=True, description=_NEEDS_QDQ_NODES),
)
"""The precision flags that the command line accepts, each with the precision to which it converts the graph."""

_PRECISION_FROM_GRAPH = "the graph determines the precision of each layer: see `ryzen-compile passes precision`"
_NO_DLA = "ryzen-compile does not build DLA or safety engines"

OPTION_ALTERNATIVES: Mapping[str, str] = {
    **dict.fromkeys(("precisionConstraints", "layerPrecisions", "layerOutputTypes", "calib"), _PRECISION_FROM_GRAPH),
    **dict.fromkeys(
        ("safe", "useDLACore", "allowGPUFallback", "buildDLAStandalone", "layerDeviceTypes", "adjustForDLA", "cpuOnly"), _NO_DLA
    ),
    "onnx": "give the model as the argument of `build`",
    "saveEngine": "give the package with -o; it contains the engines",
    "loadEngine": "give a package to `ryzen-compile run` or `ryzen-compile bench`",
    "minShapes": "use --min-shapes",
    "optShapes": "use --opt-shapes",
    "maxShapes": "use --max-shapes",
    "shapes": "use --opt-shapes",
    "profile": "repeat --min-shapes, --opt-shapes and --max-shapes: the n-th of each form the n-th profile",
    "runtimePlatform": "the operating system is part of a target: --gpu sm89@windows",
    "decomposableAttentions": "the pass `attention` marks the attentions without a fused kernel",
    "pool-limit": "use --memPoolSize, which takes MiB whereas Polygraphy takes bytes",
    "memory-pool-limit": "use --memPoolSize, which takes MiB whereas Polygraphy takes bytes",
    "sparse-weights": "use --sparsity=enable",
}
"""{option of trtexec or Polygraphy that is not a builder option here: what to use instead}."""
