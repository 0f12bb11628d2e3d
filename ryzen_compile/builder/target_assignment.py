"""Target assignment: which backend builds for which targets, and which targets no backend supports on this machine."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from ryzen_compile import registry
from ryzen_compile.backends.api import Capabilities
from ryzen_compile.backends.traits import find_traits, traits_by_priority
from ryzen_compile.errors import UsageError, did_you_mean
from ryzen_compile.spec.target import Target, detect_gpus


@dataclass(frozen=True, kw_only=True)
class TargetGroup:
    """Targets that one backend builds for in a single engine."""

    backend: str
    version: str
    targets: tuple[Target, ...]


@dataclass(frozen=True, kw_only=True)
class UnsupportedTarget:
    """A target that no backend on this machine builds for."""

    target: Target
    backend: str
    reason: str
    hint: str | None


def assign(targets: Sequence[Target], backend: str | None) -> tuple[tuple[TargetGroup, ...], tuple[UnsupportedTarget, ...]]:
    """Assign each target to the first backend in order of priority that supports it, or to `backend` only if it is given.

    Targets of one backend and operating system form one group. Raises UsageError for an unknown backend.
    """
    registered = registry.names("backends")
    if backend is not None and backend not in registered:
        raise UsageError(f"there is no backend `{backend}`", hint=did_you_mean(backend, registered))
    candidates = [backend] if backend else [traits.name for traits in traits_by_priority()]
    probe = functools.cache(lambda name: registry.find_backend(name).probe())
    grouped: dict[tuple[str, str], list[Target]] = {}
    unsupported = []
    for target in targets:
        supporting = next((name for name in _by_preference(candidates, target) if _supports(probe(name), target)), None)
        if supporting:
            grouped.setdefault((supporting, target.os), []).append(target)
        else:
            unsupported.append(_unsupported(target, {name: probe(name) for name in candidates}))
    groups = tuple(
        TargetGroup(backend=name, version=probe(name).version or "", targets=tuple(members))
        for (name, _), members in grouped.items()
    )
    return groups, tuple(unsupported)


def _by_preference(backends: Sequence[str], target: Target) -> list[str]:
    """Return `backends` in the order to try for `target`: the portable backend last for GPU targets."""
    return sorted(backends, key=lambda name: not target.is_cpu and find_traits(name).portable)


def _supports(capabilities: Capabilities, target: Target) -> bool:
    return capabilities.available and (capabilities.cpu if target.is_cpu else target.sm in capabilities.sms)


def _unsupported(target: Target, capabilities: dict[str, Capabilities]) -> UnsupportedTarget:
    """Return why no backend supports `target`, with the message of the backend that is made for such targets."""
    name = min(capabilities, key=lambda name: _distance(name, target))
    probed, traits = capabilities[name], find_traits(name)
    if traits.needs_gpu_to_build and not any(gpu.sm == target.sm for gpu in detect_gpus()):
        extra = f" and {name} installed" if probed.version is None else ""
        return UnsupportedTarget(
            target=target,
            backend=name,
            reason=f"{name} builds for the GPUs of its own machine, and this machine has no GPU of type sm{target.sm}",
            hint=f"run the same command on a machine with {target}{extra}, or leave {target} out",
        )
    reason = probed.message
    if probed.available:
        supported = ", ".join(f"sm{sm}" for sm in probed.sms) or "the CPU"
        reason = f"{name} builds for {supported} on this machine"
    return UnsupportedTarget(target=target, backend=name, reason=reason, hint=probed.install_hint)


def _distance(name: str, target: Target) -> tuple[bool, bool, int]:
    """Return the sort key of a backend for a target that none supports here: first those that would, if it were installed."""
    traits = find_traits(name)
    if target.is_cpu:
        return not traits.portable, False, traits.priority
    return target.sm not in traits.ahead_of_time_sms, not traits.needs_gpu_to_build, traits.priority
