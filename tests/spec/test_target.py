"""Parsing of build targets, and detection of GPUs."""

from __future__ import annotations

import pytest

from ryzen_compile.errors import RyzenError, UsageError
from ryzen_compile.spec.target import (
    ARCHITECTURES,
    Gpu,
    _gpu_target,
    detect_gpus,
    host_os,
    parse_target,
    parse_targets,
    products,
)


@pytest.mark.parametrize(
    ("text", "name", "sm"),
    [
        ("cpu", "cpu", None),
        ("sm89", "sm89", 89),
        ("SM_120", "sm120", 120),
        ("rtx4090", "rtx4090", 89),
        ("NVIDIA GeForce RTX 4090", "rtx4090", 89),
        ("H200", "h200", 90),
    ],
)
def test_targets_are_parsed_from_common_names(text: str, name: str, sm: int | None) -> None:
    target = parse_target(text)
    assert (target.name, target.sm, target.os) == (name, sm, host_os())


def test_the_operating_system_is_part_of_a_target() -> None:
    other_os = "windows" if host_os() == "linux" else "linux"
    assert parse_target(f"sm89@{other_os}").os == other_os
    assert parse_target(f"sm89@{other_os}") != parse_target("sm89")
    assert parse_target(f"sm89@{host_os()}") == parse_target("sm89")


def test_the_cpu_of_another_system_is_rejected_with_a_reason() -> None:
    other_os = "windows" if host_os() == "linux" else "linux"
    with pytest.raises(RyzenError, match=f"`cpu@{other_os}`: this machine runs {host_os()}") as caught:
        parse_target(f"cpu@{other_os}")
    assert caught.value.exit_code == 1
    assert parse_target(f"cpu@{host_os()}") == parse_target("cpu")


@pytest.mark.parametrize(("text", "hint"), [("sm88", "sm89"), ("rtx490", "rtx4090"), ("cpuu", "cpu")])
def test_an_unknown_target_suggests_the_closest(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_target(text)
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["", "cpu,", "sm89@mac", ","])
def test_invalid_targets_are_rejected(text: str) -> None:
    with pytest.raises(UsageError):
        parse_targets(text)


def test_duplicate_targets_are_dropped() -> None:
    assert [target.name for target in parse_targets("sm89,cpu,sm89")] == ["sm89", "cpu"]


def test_auto_detects_the_gpus_of_this_machine() -> None:
    targets = parse_targets("auto")
    gpus = detect_gpus()
    assert {target.sm for target in targets} == ({gpu.sm for gpu in gpus} or {None})


def test_a_detected_gpu_maps_to_its_product_with_its_own_memory() -> None:
    target = _gpu_target(Gpu(name="NVIDIA GeForce RTX 4090", sm=89, memory_bytes=25_757_220_864, driver="580.1"))
    assert (target.name, target.memory_bytes) == ("rtx4090", 25_757_220_864)
    assert _gpu_target(Gpu(name="NVIDIA Something New", sm=120, memory_bytes=1, driver="")).name == "sm120"


def test_every_product_has_a_known_architecture_and_a_source() -> None:
    assert len(products()) > 30
    for name, product in products().items():
        assert product.sm in ARCHITECTURES, name
        assert 1 < product.memory_gb < 1000, name
        assert 100 < product.bandwidth_gb_s < 20_000, name
        assert "NVIDIA" in product.source or "AWS" in product.source, name
        assert parse_target(name).name == name
