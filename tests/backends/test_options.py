from __future__ import annotations

import re
from pathlib import Path

import pytest

from ryzen_compile.backends.builder_options import OPTION_ALTERNATIVES, OPTIONS, PRECISION_FLAGS, parse_options
from ryzen_compile.errors import BackendError, UsageError


@pytest.mark.parametrize(
    ("raw", "read"),
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
def test_a_value_is_read_as_trtexec_reads_it(raw: dict[str, str], read: dict[str, object]) -> None:
    assert parse_options("tensorrt", raw) == read


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"builderOptimizationLevel": "6"}, "from 0 to 5"),
        ({"builderOptimizationLevel": "high"}, "a whole number"),
        ({"builderOptimizationLevel": "٣"}, "a whole number"),
        ({"memPoolSize": "workspace"}, "POOL:SIZE"),
        ({"memPoolSize": "workspace:4T"}, "POOL:SIZE"),
        ({"memPoolSize": "dlaSRAM:4"}, "POOL one of workspace, tacticSharedMem"),
        ({"refit": "no"}, "takes no value"),
        ({"sparsity": "force"}, "one of disable, enable"),
        ({"tacticSources": "JIT_CONVOLUTIONS"}, r"\+NAME to add"),
        ({"preview": "+nothing"}, "NAME one of aliasedPluginIO1003"),
        ({"timingCacheFile": ""}, "takes a value"),
        ({"staticPlugins": "none.so"}, "no file `none.so`"),
        ({"builderOptimisationLevel": "3"}, "there is no builder option"),
        ({"vc": "", "versionCompatible": ""}, "given twice"),
        ({"saveEngine": "a.plan"}, "not a builder option here"),
    ],
)
def test_what_cannot_be_read_is_a_usage_error(raw: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_options("tensorrt", raw)


def test_a_misspelt_option_gets_the_right_spelling() -> None:
    with pytest.raises(UsageError) as caught:
        parse_options("tensorrt-rtx", {"builderOptimisationLevel": "3"})
    assert caught.value.hint == "did you mean `builderOptimizationLevel`?"


REFUSED_BY_RTX = {
    "timingCacheFile", "noBuilderCache", "noCompilationCache", "errorOnTimingCacheMiss", "versionCompatible",
    "excludeLeanRuntime", "hardwareCompatibilityLevel", "stripWeights", "stripAllWeights", "refit", "setBuildRoute",
    "pluginInstanceNorm", "enablePluginOverride", "staticPlugins", "dynamicPlugins", "setPluginsToSerialize",
}  # fmt: skip


def test_rtx_refuses_exactly_what_it_cannot_do_each_with_its_reason() -> None:
    assert {option.name for option in OPTIONS if "tensorrt-rtx" in option.unsupported_backends} == REFUSED_BY_RTX
    with pytest.raises(BackendError, match="`tensorrt-rtx` does not take `--timingCacheFile`: .* has no timing cache"):
        parse_options("tensorrt-rtx", {"timingCacheFile": "t.cache"})


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_onnx_runtime_refuses_every_option_because_nothing_is_built(option: object) -> None:
    with pytest.raises(BackendError, match="there is no engine to build"):
        parse_options("onnxruntime", {option.name: "1"})  # type: ignore[attr-defined]


def test_plugin_libraries_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.so").touch()
    monkeypatch.chdir(tmp_path)
    assert parse_options("tensorrt", {"dynamicPlugins": "a.so"}) == {"dynamicPlugins": [str(tmp_path / "a.so")]}


def test_every_name_means_one_thing() -> None:
    names = [name for option in OPTIONS for name in (option.name, *option.aliases)]
    names += [*OPTION_ALTERNATIVES, *(intent.name for intent in PRECISION_FLAGS)]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-zA-Z0-9-]+", name) for name in names)


def test_a_precision_flag_expands_to_a_pass_or_says_why_not() -> None:
    passes = {intent.name: intent.pass_spec for intent in PRECISION_FLAGS}
    assert passes["fp16"] == "precision{to=fp16}"
    assert passes["bf16"] == "precision{to=bf16}"
    assert passes["int8"] is None
    assert all(intent.description for intent in PRECISION_FLAGS)
