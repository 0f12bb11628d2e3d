"""Builder options: parsing, the backends that do not support them, and the precision flags."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ryzen_compile.backends.builder_options import OPTION_ALTERNATIVES, OPTIONS, PRECISION_FLAGS, parse_options
from ryzen_compile.errors import BackendError, UsageError


@pytest.mark.parametrize(
    ("raw_options", "values"),
    [
        ({"builderOptimizationLevel": "5"}, {"builderOptimizationLevel": 5}),
        ({"builder-optimization-level": "0"}, {"builderOptimizationLevel": 0}),
        ({"memPoolSize": "workspace:4096"}, {"memPoolSize": ["workspace:4294967296"]}),
        (
            {"memPoolSize": "workspace:0.5G,tacticSharedMem:48k"},
            {"memPoolSize": ["workspace:536870912", "tacticSharedMem:49152"]},
        ),
        ({"memPoolSize": "workspace:100B"}, {"memPoolSize": ["workspace:100"]}),
        ({"vc": ""}, {"versionCompatible": True}),
        ({"refit": "true", "stripWeights": ""}, {"refit": True, "stripWeights": True}),
        ({"hardwareCompatibilityLevel": "AMPERE_PLUS"}, {"hardwareCompatibilityLevel": "ampere+"}),
        ({"tilingOptimizationLevel": "moderate"}, {"tilingOptimizationLevel": "2"}),
        ({"tacticSources": "-jit_convolutions"}, {"tacticSources": ["-jit_convolutions"]}),
        ({"maxTactics": "-1"}, {"maxTactics": -1}),
    ],
)
def test_a_value_is_parsed_as_trtexec_parses_it(raw_options: dict[str, str], values: dict[str, object]) -> None:
    assert parse_options("tensorrt", raw_options) == values


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("builderOptimizationLevel", "6", "from 0 to 5"),
        ("builderOptimizationLevel", "high", "expected an integer from 0 to 5"),
        ("builderOptimizationLevel", "٣", "expected an integer from 0 to 5"),
        ("memPoolSize", "workspace", "POOL:SIZE"),
        ("memPoolSize", "workspace:4T", "POOL:SIZE"),
        ("memPoolSize", "dlaSRAM:4", "POOL one of workspace, tacticSharedMem"),
        ("refit", "no", "takes no value"),
        ("sparsity", "force", "one of disable, enable"),
        ("tacticSources", "JIT_CONVOLUTIONS", r"\+NAME to add"),
        ("preview", "+nothing", "NAME one of aliasedPluginIO1003"),
        ("timingCacheFile", "", "takes a value"),
        ("staticPlugins", "none.so", "no file `none.so`"),
        ("builderOptimisationLevel", "3", "there is no builder option"),
        ("saveEngine", "a.plan", "not a builder option of ryzen-compile"),
    ],
)
def test_an_invalid_option_is_a_usage_error(option: str, value: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_options("tensorrt", {option: value})


def test_an_option_under_two_names_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="given twice"):
        parse_options("tensorrt", {"vc": "", "versionCompatible": ""})


def test_a_misspelled_option_suggests_the_correct_name() -> None:
    with pytest.raises(UsageError) as caught:
        parse_options("tensorrt-rtx", {"builderOptimisationLevel": "3"})
    assert caught.value.hint == "did you mean `builderOptimizationLevel`?"


UNSUPPORTED_BY_RTX = {
    "timingCacheFile", "noBuilderCache", "noCompilationCache", "errorOnTimingCacheMiss", "versionCompatible",
    "excludeLeanRuntime", "hardwareCompatibilityLevel", "stripWeights", "stripAllWeights", "refit", "setBuildRoute",
    "pluginInstanceNorm", "enablePluginOverride", "staticPlugins", "dynamicPlugins", "setPluginsToSerialize",
}  # fmt: skip


def test_rtx_rejects_exactly_the_unsupported_options_with_the_reason() -> None:
    assert {option.name for option in OPTIONS if "tensorrt-rtx" in option.unsupported_backends} == UNSUPPORTED_BY_RTX
    with pytest.raises(BackendError, match="`tensorrt-rtx` does not support `--timingCacheFile`: .* has no timing cache"):
        parse_options("tensorrt-rtx", {"timingCacheFile": "t.cache"})


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_onnx_runtime_rejects_every_option_because_it_builds_no_engine(option: object) -> None:
    with pytest.raises(BackendError, match="`onnxruntime` does not support .* runs the graph itself and builds no engine"):
        parse_options("onnxruntime", {option.name: "1"})  # type: ignore[attr-defined]


def test_paths_of_plugin_libraries_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.so").touch()
    monkeypatch.chdir(tmp_path)
    assert parse_options("tensorrt", {"dynamicPlugins": "a.so"}) == {"dynamicPlugins": [str(tmp_path / "a.so")]}


def test_every_name_is_unique() -> None:
    names = [name for option in OPTIONS for name in (option.name, *option.aliases)]
    names += [*OPTION_ALTERNATIVES, *(flag.name for flag in PRECISION_FLAGS)]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-zA-Z0-9-]+", name) for name in names)


def test_a_precision_flag_has_a_precision_or_a_reason() -> None:
    precisions = {flag.name: flag.precision for flag in PRECISION_FLAGS}
    assert precisions == dict.fromkeys(("stronglyTyped", "int8", "fp8")) | {"fp16": "fp16", "bf16": "bf16", "best": "fp16"}
    assert {flag.name for flag in PRECISION_FLAGS if flag.refused} == {"int8", "fp8"}
    assert all(flag.description for flag in PRECISION_FLAGS)
