"""Builder options, by the names that trtexec gives them: what each takes, what it sets, and which backend refuses it and why.

One table serves the command line, the check before a build, and the child process that builds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ryzen_compile.backends import builder_option_values as words
from ryzen_compile.backends.builder_option_values import Reader, Setter, Settings, Value
from ryzen_compile.errors import BackendError, UsageError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Option:
    """One builder option."""

    name: str
    says: str
    metavar: str | None = None
    """What the command line shows in place of the value; None: it takes no value."""
    read: Reader
    set: Setter
    aliases: tuple[str, ...] = ()
    """Other names that mean the same with the same values: trtexec's short ones, Polygraphy's."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """The backends that do not take it, each with the reason."""


@dataclass(frozen=True, kw_only=True)
class Intent:
    """A precision flag of earlier versions of trtexec: since TensorRT 11 the precision is what the graph says."""

    name: str
    passes: str | None
    """The pass that does it to the graph; empty where there is nothing to do, None where nothing does it."""
    says: str


def accept(backend: str, raw: Mapping[str, str]) -> dict[str, Value]:
    """Read options as the command line gives them: {name without dashes: value, empty for a switch}.

    Raises UsageError for an unknown name or a value that cannot be read, BackendError for what `backend` does not take.
    """
    known = {alias: option for option in OPTIONS for alias in (option.name, *option.aliases)}
    found: dict[str, Value] = {}
    for name, text in raw.items():
        if name in ELSEWHERE:
            raise UsageError(f"`--{name}` is not a builder option here", hint=ELSEWHERE[name])
        if name not in known:
            raise UsageError(f"there is no builder option `--{name}`", hint=did_you_mean(name, sorted(known)))
        option = known[name]
        if option.name in found:
            raise UsageError(f"`--{option.name}` is given twice", hint="give it once")
        reason = _NOTHING_TO_BUILD if backend == "onnxruntime" else option.refused.get(backend)
        if reason:
            raise BackendError(f"`{backend}` does not take `--{name}`: {reason}", hint=f"leave `--{name}` out")
        try:
            found[option.name] = option.read(text.strip())
        except ValueError as error:
            raise UsageError(f"`--{name}={text}`: {error}", hint=option.says) from error
    return found


def apply(options: Mapping[str, Value], settings: Settings) -> None:
    """Set accepted options."""
    by_name = {option.name: option for option in OPTIONS}
    for name, value in options.items():
        by_name[name].set(settings, value)


_NOTHING_TO_BUILD = "ONNX Runtime runs the graph as it is, there is no engine to build"
_NO_TIMING_CACHE = {"tensorrt-rtx": "TensorRT for RTX has no timing cache"}
_NEEDS_GPU = {"tensorrt-rtx": "TensorRT for RTX does it only where a GPU is, and ahead of time none is asked for"}
_NO_LEAN = {"tensorrt-rtx": "it needs the lean runtime, which TensorRT for RTX does not ship"}
_NO_PLUGINS = {"tensorrt-rtx": "NVIDIA does not support plugins in TensorRT for RTX"}

OPTIONS: tuple[Option, ...] = (
    Option(
        name="builderOptimizationLevel",
        says="how hard the builder searches, from 0 to 5; 3 where it is not given",
        metavar="0..5",
        read=words.integer(0, 5),
        set=words.attribute("builder_optimization_level"),
        aliases=("builder-optimization-level",),
    ),
    Option(
        name="memPoolSize",
        says="the most memory of a pool: workspace:4096 is MiB, workspace:512K has a suffix of B, K, M or G",
        metavar="POOL:SIZE,...",
        read=words.pools,
        set=words.set_pools,
    ),
    Option(
        name="timingCacheFile",
        says="read measured tactics from this file, and write them back",
        metavar="FILE",
        read=words.word,
        set=words.nothing,  # `tensorrt.py` reads and writes it around the build
        refused=_NO_TIMING_CACHE,
    ),
    Option(
        name="noBuilderCache",
        says="use no timing cache",
        read=words.switch,
        set=words.flag("DISABLE_TIMING_CACHE"),
        refused=_NO_TIMING_CACHE,
    ),
    Option(
        name="noCompilationCache",
        says="use no compilation cache, which is part of the timing cache",
        read=words.switch,
        set=words.flag("DISABLE_COMPILATION_CACHE"),
        aliases=("disable-compilation-cache",),
        refused=_NO_TIMING_CACHE,
    ),
    Option(
        name="errorOnTimingCacheMiss",
        says="fail where a tactic is not in the timing cache, instead of measuring it",
        read=words.switch,
        set=words.flag("ERROR_ON_TIMING_CACHE_MISS"),
        aliases=("error-on-timing-cache-miss",),
        refused=_NO_TIMING_CACHE,
    ),
    Option(
        name="versionCompatible",
        says="make an engine that later versions of TensorRT load too",
        read=words.switch,
        set=words.flag("VERSION_COMPATIBLE"),
        aliases=("vc", "version-compatible"),
        refused=_NO_LEAN,
    ),
    Option(
        name="excludeLeanRuntime",
        says="leave the lean runtime out of a version-compatible engine",
        read=words.switch,
        set=words.flag("EXCLUDE_LEAN_RUNTIME"),
        aliases=("exclude-lean-runtime",),
        refused=_NO_LEAN,
    ),
    Option(
        name="hardwareCompatibilityLevel",
        says="make an engine for other GPUs too: none, ampere+ or sameComputeCapability",
        metavar="LEVEL",
        read=words.choice(("none",), ("ampere+", "ampere_plus"), ("sameComputeCapability", "same_compute_capability")),
        set=words.member(
            "hardware_compatibility_level",
            "HardwareCompatibilityLevel",
            {"none": "NONE", "ampere+": "AMPERE_PLUS", "sameComputeCapability": "SAME_COMPUTE_CAPABILITY"},
        ),
        aliases=("hardware-compatibility-level",),
        refused={"tensorrt-rtx": "its plans hold several targets instead: list them in --gpu"},
    ),
    Option(
        name="stripWeights",
        says="leave the weights out of the engine, to be put back when it is loaded",
        read=words.switch,
        set=words.flag("STRIP_PLAN"),
        aliases=("strip-plan",),
        refused=_NEEDS_GPU,
    ),
    Option(
        name="stripAllWeights",
        says="the same as --refit and --stripWeights together",
        read=words.switch,
        set=words.flag("REFIT", "STRIP_PLAN"),
        refused=_NEEDS_GPU,
    ),
    Option(
        name="refit",
        says="let the weights of the engine be changed",
        read=words.switch,
        set=words.flag("REFIT"),
        aliases=("refittable",),
        refused=_NEEDS_GPU,
    ),
    Option(
        name="allowWeightStreaming",
        says="let weights stay on the host and be streamed to the GPU",
        read=words.switch,
        set=words.flag("WEIGHT_STREAMING"),
        aliases=("weight-streaming",),
    ),
    Option(
        name="sparsity",
        says="disable, or enable kernels for weights that are sparse 2:4",
        metavar="disable|enable",
        read=words.choice(("disable",), ("enable",)),
        set=words.set_sparsity,
    ),
    Option(name="noTF32", says="compute float32 without TF32's shorter mantissa", read=words.switch, set=words.set_no_tf32),
    Option(
        name="maxAuxStreams",
        says="how many streams an inference may use beside its own",
        metavar="N",
        read=words.integer(0),
        set=words.attribute("max_aux_streams"),
        aliases=("max-aux-streams",),
    ),
    Option(
        name="tilingOptimizationLevel",
        says="how hard to search for tilings that stay in the L2 cache: 0 none, 1 fast, 2 moderate, 3 full",
        metavar="0..3",
        read=words.choice(("0", "none"), ("1", "fast"), ("2", "moderate"), ("3", "full")),
        set=words.member(
            "tiling_optimization_level",
            "TilingOptimizationLevel",
            {"0": "NONE", "1": "FAST", "2": "MODERATE", "3": "FULL"},
        ),
        aliases=("tiling-optimization-level",),
    ),
    Option(
        name="l2LimitForTiling",
        says="how many bytes of the L2 cache tilings may use",
        metavar="BYTES",
        read=words.integer(0),
        set=words.attribute("l2_limit_for_tiling"),
    ),
    Option(
        name="maxTactics",
        says="how many tactics to time where there is a choice; -1: the builder decides",
        metavar="N",
        read=words.integer(-1),
        set=words.attribute("max_num_tactics"),
    ),
    Option(
        name="avgTiming",
        says="how many runs are averaged when a tactic is timed",
        metavar="N",
        read=words.integer(1),
        set=words.attribute("avg_timing_iterations"),
    ),
    Option(
        name="profilingVerbosity",
        says="how much of the layers the engine tells; the report on precision and fusion needs detailed, which is the default",
        metavar="MODE",
        read=words.choice(("detailed",), ("layer_names_only",), ("none",)),
        set=words.member(
            "profiling_verbosity",
            "ProfilingVerbosity",
            {"detailed": "DETAILED", "layer_names_only": "LAYER_NAMES_ONLY", "none": "NONE"},
        ),
        aliases=("profiling-verbosity",),
    ),
    Option(
        name="tacticSources",
        says="add or remove sources of tactics: -JIT_CONVOLUTIONS",
        metavar="+|-NAME,...",
        read=words.signed(words.TACTICS),
        set=words.set_tactics,
    ),
    Option(
        name="preview",
        says="switch preview features on or off: +runtimeActivationResize",
        metavar="+|-NAME,...",
        read=words.signed(words.PREVIEWS),
        set=words.set_previews,
    ),
    Option(
        name="distributiveIndependence",
        says="let no row of a batch depend on the others, to the last bit",
        read=words.switch,
        set=words.flag("DISTRIBUTIVE_INDEPENDENCE"),
    ),
    Option(
        name="directIO",
        says="avoid reformatting at the border of the graph",
        read=words.switch,
        set=words.flag("DIRECT_IO"),
        aliases=("direct-io",),
    ),
    Option(
        name="setBuildRoute",
        says="the route of compiler knobs that trtexec's tuner found",
        metavar="ROUTE",
        read=words.word,
        set=words.attribute("build_route"),
        refused={"tensorrt-rtx": "TensorRT for RTX offers no build routes"},
    ),
    Option(
        name="pluginInstanceNorm",
        says="let a plugin do InstanceNormalization",
        read=words.switch,
        set=words.set_instance_norm,
        aliases=("pi",),
        refused=_NO_PLUGINS,
    ),
    Option(
        name="enablePluginOverride",
        says="let plugins go before the parser's own import of an op",
        read=words.switch,
        set=words.set_plugin_override,
        refused=_NO_PLUGINS,
    ),
    Option(
        name="staticPlugins",
        says="plugin libraries to load",
        metavar="FILE,...",
        read=words.libraries,
        set=words.load_static,
        refused=_NO_PLUGINS,
    ),
    Option(
        name="dynamicPlugins",
        says="plugin libraries to load through the plugin registry",
        metavar="FILE,...",
        read=words.libraries,
        set=words.load_dynamic,
        refused=_NO_PLUGINS,
    ),
    Option(
        name="setPluginsToSerialize",
        says="plugin libraries to put into the engine",
        metavar="FILE,...",
        read=words.libraries,
        set=words.attribute("plugins_to_serialize"),
        refused=_NO_PLUGINS,
    ),
)

_PRECISION = "TensorRT 11 computes in the types that the graph says"
_QUANTISED = "the graph itself must hold the QuantizeLinear and DequantizeLinear nodes: NVIDIA ModelOpt writes such graphs"

INTENTS: tuple[Intent, ...] = (
    Intent(name="fp16", passes="precision{to=fp16}", says=_PRECISION),
    Intent(name="bf16", passes="precision{to=bf16}", says=_PRECISION),
    Intent(name="best", passes="precision{to=fp16}", says=f"{_PRECISION}; fp16 is the fastest that needs no calibration"),
    Intent(name="stronglyTyped", passes="", says="every network is strongly typed since TensorRT 11: nothing to do"),
    Intent(name="int8", passes=None, says=_QUANTISED),
    Intent(name="fp8", passes=None, says=_QUANTISED),
)
"""The flags that the command line takes as intent, and the pass that each expands to."""

_IS_PASSES = "the precision of each layer is what the graph says: see `ryzen-compile passes precision`"
_NO_DLA = "DLA and safety engines are not built here"

ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(("precisionConstraints", "layerPrecisions", "layerOutputTypes", "calib"), _IS_PASSES),
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
