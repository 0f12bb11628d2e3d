"""Lots: which backend builds for which targets, and which targets nobody here can build for."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from ryzen_compile import registry
from ryzen_compile.backends.api import Capabilities
from ryzen_compile.errors import UsageError, did_you_mean
from ryzen_compile.spec.target import Target

PREFERENCE = ("onnxruntime", "tensorrt-rtx", "tensorrt")
"""Who is asked first. TensorRT-RTX goes before TensorRT because it builds for GPUs that are not here."""


@dataclass(frozen=True, kw_only=True)
class TargetGroup:
    """Targets that one backend builds for in one go."""

    backend: str
    version: str
    targets: tuple[Target, ...]


@dataclass(frozen=True, kw_only=True)
class UnsupportedTarget:
    """A target that no backend here builds for."""

    target: Target
    backend: str
    reason: str
    hint: str | None


def assign(targets: Sequence[Target], backend: str | None) -> tuple[tuple[TargetGroup, ...], tuple[UnsupportedTarget, ...]]:
    """Deal `targets` to the backends: the first of PREFERENCE that can, or only `backend` when it is named.

    Targets of one backend and operating system make one lot. Raises UsageError for an unknown backend.
    """
    known = registry.names("backends")
    if backend is not None and backend not in known:
        raise UsageError(f"there is no backend `{backend}`", hint=did_you_mean(backend, known))
    asked = [backend] if backend else sorted(known, key=lambda name: (*PREFERENCE, name).index(name))
    probe = functools.cache(lambda name: registry.find_backend(name).probe())
    dealt: dict[tuple[str, str], list[Target]] = {}
    misfits = []
    for target in targets:
        taker = next((name for name in _by_preference(asked, target) if _supports(probe(name), target)), None)
        if taker:
            dealt.setdefault((taker, target.os), []).append(target)
        else:
            misfits.append(_unsupported(target, {name: probe(name) for name in asked}))
    lots = tuple(
        TargetGroup(backend=name, version=probe(name).version or "", targets=tuple(group)) for (name, _), group in dealt.items()
    )
    return lots, tuple(misfits)


def _by_preference(backends: Sequence[str], target: Target) -> list[str]:
    """Return `backends` in the order in which `target` asks them: ONNX Runtime last where there is something to compile."""
    return sorted(backends, key=lambda name: not target.is_cpu and name == "onnxruntime")


def _supports(capabilities: Capabilities, target: Target) -> bool:
    return capabilities.available and (capabilities.cpu if target.is_cpu else target.sm in capabilities.sms)


def _unsupported(target: Target, capabilities: dict[str, Capabilities]) -> UnsupportedTarget:
    """Say why nobody takes `target`, in the words of the backend that comes closest."""
    for_kind = [name for name, one in capabilities.items() if one.cpu == target.is_cpu] or list(capabilities)
    absent = [name for name in for_kind if not capabilities[name].available]
    name = absent[-1] if absent else for_kind[-1]
    says = capabilities[name].message
    if capabilities[name].available:
        reach = ", ".join(f"sm{sm}" for sm in capabilities[name].sms) or "the CPU"
        says = f"{name} builds for {reach} here"
    return UnsupportedTarget(target=target, backend=name, reason=says, hint=capabilities[name].install_hint)
