"""Random inputs of one run, and the advice for a model that does not run with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ryzen_compile.data.synthetic import synthesize
from ryzen_compile.spec.interface import Inputs, Interface
from ryzen_compile.spec.profile import Profile, format_profile
from ryzen_compile.spec.profile_request import resolve_profiles


def random_inputs(
    interface: Interface, profiles: Sequence[Profile], *, shapes: str | None, seed: int
) -> dict[str, np.ndarray[Any, Any]]:
    """Return random inputs of `shapes`, in trtexec's syntax; None: of the optimum of the first profile."""
    profile = profiles[0] if shapes is None else resolve_profiles(interface, opt_shapes=[shapes])[0]
    return synthesize(interface, profile.opt, seed=seed, rows="mixed")


def random_inputs_hint(interface: Interface, inputs: Inputs) -> str:
    """Return the advice for a model that does not run with random inputs."""
    if not any(spec.is_dynamic for spec in interface.inputs):
        return "give valid inputs with --data FILE.npz"
    shapes = {spec.name: tuple(inputs[spec.name].shape) for spec in interface.inputs}
    sample = format_profile(Profile(min=shapes, opt=shapes, max=shapes), interface)
    return (
        f"give other shapes, with which it runs, in the form of these: --shapes {sample}; or valid inputs with --data FILE.npz"
    )
