"""Lookup of candidates by reference: packages, ONNX files, PyTorch functions and recipes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeAlias

from ryzen_compile import registry
from ryzen_compile.artifacts.package.reference import parse_package_reference
from ryzen_compile.errors import UsageError
from ryzen_compile.numerics.onnx_candidates import onnx_candidate
from ryzen_compile.spec.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from ryzen_compile.numerics.candidate import Candidate

ModelReference: TypeAlias = "str | os.PathLike[str] | Recipe | torch.nn.Module | tuple[torch.nn.Module, Any]"
"""A model to compare: a package, an ONNX file, `FILE.py:FUNCTION`, `recipe:NAME`, `hf:FOLDER`, a recipe, a module, or (module,
inputs) with the inputs as a tuple or a dict of tensors."""

_USAGE_HINT = (
    "give a package (model.ryzen, with #GRAPH and @VARIANT, @BACKEND or @FILE), an ONNX file, FILE.py:FUNCTION, recipe:NAME "
    "or hf:FOLDER"
)


def find_candidates(reference: ModelReference) -> tuple[Candidate, ...]:
    """Return the candidates that `reference` names: one, or all that a package contains.

    `model.ryzen` refers to every graph, variant and engine of the package, `model.ryzen#decode@fold+attention` to one variant
    and its engines. Raises UsageError if `reference` is not valid, and the errors of reading the model.
    """
    if not isinstance(reference, (str, os.PathLike)):
        from ryzen_compile.numerics.torch_candidates import torch_candidate

        return (torch_candidate(reference, name=_module_name(reference)),)
    text = os.fspath(reference)
    if registry.is_module_reference(text):
        from ryzen_compile.numerics.torch_candidates import torch_candidate

        return (torch_candidate(text, name=text),)
    reference = parse_package_reference(text)
    path = reference.path
    if path.is_dir() or path.suffix == ".ryzen":
        from ryzen_compile.numerics.package_candidates import package_candidates

        return package_candidates(reference)
    if path.suffix == ".onnx" or path.is_file():
        return (onnx_candidate(path),)
    if text in registry.names("recipes"):
        raise UsageError(f"there is no file `{text}`", hint=f"for the recipe of that name write recipe:{text}")
    raise UsageError(f"there is no file `{text}`", hint=_USAGE_HINT)


def find_candidate(reference: ModelReference) -> Candidate:
    """Return the one candidate that `reference` names; of several of one graph, the first that is portable.

    Raises UsageError if `reference` names several candidates.
    """
    candidates = find_candidates(reference)
    if len(candidates) > 1 and len({candidate.graph for candidate in candidates}) == 1:
        candidates = tuple(candidate for candidate in candidates if candidate.can_be_baseline)[:1] or candidates
    if len(candidates) != 1:
        names = ", ".join(candidate.name for candidate in candidates)
        raise UsageError(f"`{reference}` refers to {len(candidates)} candidates, not one", hint=f"choose one of {names}")
    return candidates[0]


def _module_name(model: Recipe | torch.nn.Module | tuple[torch.nn.Module, Any]) -> str:
    """Return the name of a module that is passed as an object: that of its recipe or of its class."""
    if isinstance(model, Recipe):
        return model.name
    return type(model[0] if isinstance(model, tuple) and model else model).__name__
