"""Builder options, by the names that trtexec gives them: what each takes, what it sets, and which backend refuses it and why.

One table serves the command line, the check before a build, and the child process that builds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ryzen_compile.backends import builder_option_values as option_values
from ryzen_compile.backends.builder_option_values import BuilderHandles, OptionParser, OptionSetter, OptionValue
from ryzen_compile.errors import BackendError, UsageError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class BuilderOption:
    """One builder option."""

    name: str
    description: str
    metavar: str | None = None
    """What the command line shows in place of the value; None: it takes no value."""
    parse: OptionParser
    apply: OptionSetter
    aliases: tuple[str, ...] = ()
    """Other names that mean the same with the same values: trtexec's short ones, Polygraphy's."""
    unsupported_backends: Mapping[str, str] = field(default_factory=dict)
    """The backends that do not take it, each with the reason."""


@dataclass(frozen=True, kw_only=True)
class PrecisionFlag:
    """A precision flag of earlier versions of trtexec: since TensorRT 11 the precision is what the graph says."""

    name: str
    pass_spec: str | None
    """The pass that does it to the graph; empty where there is nothing to do, None where nothing does it."""
    description: str


def parse_options(backend: str, raw_options: Mapping[str, str]) -> dict[str, OptionValue]:
    """Read options as the command line gives them: {name without dashes: value, empty for a switch}.

    Raises UsageError for an unknown name or a value that cannot be read, BackendError for what `backend` does not take.
    """
    known = {alias: option for option in OPTIONS for alias in (option.name, *option.aliases)}
    found: dict[str, OptionValue] = {}
    for name, text in raw_options.items():
        if name in OPTION_ALTERNATIVES:
            raise UsageError(f"`--{name}` is not a builder option here", hint=OPTION_ALTERNATIVES[name])
        if name not in known:
            raise UsageError(f"there is no builder option `--{name}`", hint=did_you_mean(name, sorted(known)))
        option = known[name]
        if option.name in found:
            raise UsageError(f"`--{option.name}` is given twice", hint="give it once")
        reason = _NO_ENGINE_BUILD if backend == "onnxruntime" else option.unsupported_backends.get(backend)
        if reason:
            raise BackendError(f"`{backend}` does not take `--{name}`: {reason}", hint=f"leave `--{name}` out")
        try:
            found[option.name] = option.parse(text.strip())
        except ValueError as error:
            raise UsageError(f"`--{name}={text}`: {error}", hint=option.description) from error
    return found


def apply_options(options: Mapping[str, OptionValue], handles: BuilderHandles) -> None:
    """Set accepted options."""
    by_name = {option.name: option for option in OPTIONS}
    for name, value in options.items():
        by_name[name].apply(handles, value)


_NO_ENGINE_BUILD = "ONNX Runtime runs the graph as it is, there is no engine to build"
_NO_TIMING_CACHE = {"tensorrt-rtx": "TensorRT for RTX has no timing cache"}
_NEEDS_GPU = {"tensorrt-rtx": "TensorRT for RTX does it only where a GPU is, and ahead of time none is asked for"}
_NO_LEAN_RUNTIME = {"tensorrt-rtx": "it needs the lean runtime, which TensorRT for RTX does not ship"}
_NO_PLUGINS = {"tensorrt-rtx": "NVIDIA does not support plugins in TensorRT for RTX"}

OPTIONS: tuple[BuilderOption, ...] = (
    BuilderOption(
        name="builderOptimizationLevel",
        description="how hard the builder searches, from 0 to 5; 3 where it is not given",
        metavar="0..5",
        parse=option_values.int_range(0, 5),
        apply=option_values.set_config_attribute("builder_optimization_level"),
        aliases=("builder-optimization-level",),
    ),
    BuilderOption(
        name="memPoolSize",
        description="the most memory of a pool: workspace:4096 is MiB, workspace:512K has a suffix of B, K, M or G",
        metavar="POOL:SIZE,...",
        parse=option_values.parse_memory_pools,
        apply=option_values.set_memory_pools,
    ),
    BuilderOption(
        name="timingCacheFile",
        description="read measured tactics from this file, and write them back",
        metavar="FILE",
        parse=option_values.parse_text,
        apply=option_values.set_nothing,  # `tensorrt.py` reads and writes it around the build
        unsupported_backends=_NO_TIMING_CACHE,
    ),
    BuilderOption(
        name="noBuilderCache",
        description="use no timing cache",
        parse=option_values.parse_switch,
        apply=option_values.set_builder_flags("DISABLE_TIMING_CACHE"),
        unsupported_backends=_NO_TIMING_CACHE,
    ),
    BuilderOption(
        name="noCompilationCache",
        description="use no compilation cache, which is part of the timing cache",
        parse=option_values.parse_switch,
        apply=option_values.set_builder_flags("DISABLE_COMPILATION_CACHE"),
        aliases=("disable-compilation-cache",),
        unsupported_backends=_NO_TIMING_CACHE,
    ),
    BuilderOption(
        name="errorOnTimingCacheMiss",
        description="fail where a tactic is not in the timing cache, instead of measuring it",
        parse=option_values.parse_switch,
        apply=option_values.set_builder_flags("ERROR_ON_TIMING_CACHE_MISS"),
        aliases=("error-on-timing-cache-miss",),
        unsupported_backends=_NO_TIMING_CACHE,
    ),
    BuilderOption(
        name="versionCompatible",
        description="make an engine that later versions of TensorRT load too",
        parse=option_values.parse_switch,
        apply=option_values.set_builder_flags("VERSION_COMPATIBLE"),
        aliases=("vc", "version-compatible"),
        unsupported_backends=_NO_LEAN_RUNTIME,
    ),
    BuilderOption(
        name="excludeLeanRuntime",
        description="leave the lean runtime out of a version-compatible engine",
        parse=option_values.parse_switch,
        apply=option_values.set_builder_flags("EXCLUDE_LEAN_RUNTIME"),
        aliases=("exclude-lean-runtime",),
        unsupported_backends=_NO_LEAN_RUNTIME,
    ),
    BuilderOption(
        name="hardwareCompatibilityLevel",
        description="make an engine for other GPUs too: none, ampere+ or sameComputeCapability",
        metavar="LEVEL",
        parse=option_values.one_of(("none",), ("ampere+", "ampere_plus"), ("sameComputeCapability", "same_compute_capability")),
        apply=option_values.set_config_enum(
            "hardware_compatibility_level",
            "HardwareCompatibilityLevel",
            {"none": "NONE", "ampere+": "AMPERE_PLUS", "sameComputeCapability": "SAME_COMPUTE_CAPABILITY"},
        ),
        aliases=("hardware-compatibility-level",),
        unsupported_backends={"tensorrt-rtx": "its plans hold several targets instead: list them in --gpu"},
    ),
    BuilderOption(
        name="stripWeights",
        description="leave the weights out of the engine, to be put back when it is loaded",
        parse=option_values.parse_switch,
        apply=option_values.set_builder_flags("STRIP_PLAN"),
        aliases=("strip-plan",),
        unsupported_backends=_NEEDS_GPU,
    ),
    BuilderOption(
        name="stripAllWeights",
        description="the same as --refit and --stripWeights together",
        parse=option_values.parse_switch,
        apply=option_values.set_builder_flags("REFIT", "STRIP_PLAN"),
        unsupported_backends=_NEEDS_GPU,
    ),
    BuilderOption(
        name="refit",
        description="let the weights of the engine be changed",
        parse=option_values.parse_switch,
        apply=option_values.set_builder_flags("REFIT"),
        aliases=("refittable",),
        unsupported_backends=_NEEDS_GPU,
    ),
    BuilderOption(
        name="allowWeightStreaming",
        description="let weights stay on the host and be streamed to the GPU",
        parse=option_values.parse_switch,
        apply=option_values.set_builder_flags("WEIGHT_STREAMING"),
        aliases=("weight-streaming",),
    ),
    BuilderOption(
        name="sparsity",
        description="disable, or enable kernels for weights that are sparse 2:4",
        metavar="disable|enable",
        parse=option_values.one_of(("disable",), ("enable",)),
        apply=option_values.set_sparsity,
    ),
    BuilderOption(
        name="noTF32",
        description="compute float32 without TF32's shorter mantissa",
        parse=option_values.parse_switch,
        apply=option_values.disable_tf32,
    ),
    BuilderOption(
        name="maxAuxStreams",
        description="how many streams an inference may use beside its own",
        metavar="N",
        parse=option_values.int_range(0),
        apply=option_values.set_config_attribute("max_aux_streams"),
        aliases=("max-aux-streams",),
    ),
    BuilderOption(
        name="tilingOptimizationLevel",
        description="how hard to search for tilings that stay in the L2 cache: 0 none, 1 fast, 2 moderate, 3 full",
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
        description="how many bytes of the L2 cache tilings may use",
        metavar="BYTES",
        parse=option_values.int_range(0),
        apply=option_values.set_config_attribute("l2_limit_for_tiling"),
    ),
    BuilderOption(
        name="maxTactics",
        description="how many tactics to time where there is a choice; -1: the builder decides",
        metavar="N",
        parse=option_values.int_range(-1),
        apply=option_values.set_config_attribute("max_num_tactics"),
    ),
    BuilderOption(
        name="avgTiming",
        description="how many runs are averaged when a tactic is timed",
        metavar="N",
        parse=option_values.int_range(1),
        apply=option_values.set_config_attribute("avg_timing_iterations"),
    ),
    BuilderOption(
        name="profilingVerbosity",
        description="how much of the layers the engine tells; the report on precision and fusion needs detailed, which is the default",
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
        description="add or remove sources of tactics: -JIT_CONVOLUTIONS",
        metavar="+|-NAME,...",
        parse=option_values.signed_names(option_values.TACTIC_SOURCES),
        apply=option_values.set_tactic_sources,
    ),
    BuilderOption(
        name="preview",
        description="switch preview features on or off: +runtimeActivationResize",
        metavar="+|-NAME,...",
        parse=option_values.signed_names(option_values.PREVIEW_FEATURES),
        apply=option_values.set_preview_features,
    ),
    BuilderOption(
        name="distributiveIndependence",
        description="let no row of a batch depend on the others, to the last bit",
        parse=option_values.parse_switch,
        apply=option_values.set_builder_flags("DISTRIBUTIVE_INDEPENDENCE"),
    ),
    BuilderOption(
        name="directIO",
        description="avoid reformatting at the border of the graph",
        parse=option_values.parse_switch,
        apply=option_values.set_builder_flags("DIRECT_IO"),
        aliases=("direct-io",),
    ),
    BuilderOption(
        name="setBuildRoute",
        description="the route of compiler knobs that trtexec's tuner found",
        metavar="ROUTE",
        parse=option_values.parse_text,
        apply=option_values.set_config_attribute("build_route"),
        unsupported_backends={"tensorrt-rtx": "TensorRT for RTX offers no build routes"},
    ),
    BuilderOption(
        name="pluginInstanceNorm",
        description="let a plugin do InstanceNormalization",
        parse=option_values.parse_switch,
        apply=option_values.use_instance_norm_plugin,
        aliases=("pi",),
        unsupported_backends=_NO_PLUGINS,
    ),
    BuilderOption(
        name="enablePluginOverride",
        description="let plugins go before the parser's own import of an op",
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
        description="plugin libraries to put into the engine",
        metavar="FILE,...",
        parse=option_values.parse_library_paths,
        apply=option_values.set_config_attribute("plugins_to_serialize"),
        unsupported_backends=_NO_PLUGINS,
    ),
)

_STRONGLY_TYPED = "TensorRT 11 computes in the types that the graph says"
_NEEDS_QDQ_NODES = (
    "the graph itself must hold the QuantizeLinear and DequantizeLinear nodes: NVIDIA ModelOpt writes such graphs"
)

PRECISION_FLAGS: tuple[PrecisionFlag, ...] = (
    PrecisionFlag(name="fp16", pass_spec="precision{to=fp16}", description=_STRONGLY_TYPED),
    PrecisionFlag(name="bf16", pass_spec="precision{to=bf16}", description=_STRONGLY_TYPED),
    PrecisionFlag(
        name="best",
        pass_spec="precision{to=fp16}",
        description=f"{_STRONGLY_TYPED}; fp16 is the fastest that needs no calibration",
    ),
    PrecisionFlag(
        name="stronglyTyped", pass_spec="", description="every network is strongly typed since TensorRT 11: nothing to do"
    ),
    PrecisionFlag(name="int8", pass_spec=None, description=_NEEDS_QDQ_NODES),
    PrecisionFlag(name="fp8", pass_spec=None, description=_NEEDS_QDQ_NODES),
)
"""The flags that the command line takes as intent, and the pass that each expands to."""

_PRECISION_FROM_GRAPH = "the precision of each layer is what the graph says: see `ryzen-compile passes precision`"
_NO_DLA = "DLA and safety engines are not built here"

OPTION_ALTERNATIVES: Mapping[str, str] = {
    **dict.fromkeys(("precisionConstraints", "layerPrecisions", "layerOutputTypes", "calib"), _PRECISION_FROM_GRAPH),
    **dict.fromkeys(
        ("safe", "useDLACore", "allowGPUFallback", "buildDLAStandalone", "layerDeviceTypes", "adjustForDLA", "cpuOnly"), _NO_DLA
    ),
    "onnx": "give the model as the argument of `build`",
    "saveEngine": "give the package with -o; the engines lie in it",
    "loadEngine": "`ryzen-compile run` and `bench` take a package",
    "minShapes": "write --min-shapes",
    "optShapes": "write --opt-shapes",
    "maxShapes": "write --max-shapes",
    "shapes": "write --opt-shapes",
    "profile": "repeat --min-shapes, --opt-shapes and --max-shapes: the n-th of each are the n-th profile",
    "runtimePlatform": "the operating system is part of a target: --gpu sm89@windows",
    "decomposableAttentions": "the pass `attention` marks the attentions that have no fused kernel",
    "pool-limit": "write --memPoolSize, which counts in MiB where Polygraphy counts in bytes",
    "memory-pool-limit": "write --memPoolSize, which counts in MiB where Polygraphy counts in bytes",
    "sparse-weights": "write --sparsity=enable",
}
"""Names that trtexec or Polygraphy know as options and that are something else here: what to do instead."""
