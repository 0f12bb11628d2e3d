"""Subjects by their spelling: packages, ONNX files, PyTorch functions and recipes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ryzen_compile import registry
from ryzen_compile.errors import UsageError
from ryzen_compile.numerics.onnx_candidates import onnx_candidate
from ryzen_compile.utils.user_script import is_script_reference

if TYPE_CHECKING:
    from ryzen_compile.numerics.candidate import Candidate

_USAGE_HINT = "give a package (model.ryzen, with #GRAPH and @VARIANT or @ENGINE), an ONNX file, FILE.py:FUNCTION or recipe:NAME"


def find_candidates(text: str) -> tuple[Candidate, ...]:
    """Return what `text` spells: one subject, or all that a package holds.

    `model.ryzen` stands for every graph, variant and engine of the package, `model.ryzen#decode@fp16` for one. Raises
    UsageError for what is none of these, and whatever reading it raises.
    """
    if text.startswith("recipe:") or is_script_reference(text):
        from ryzen_compile.numerics.torch_candidates import torch_candidate

        return (torch_candidate(text.removeprefix("recipe:"), name=text),)
    path, graph, which = split_package_reference(text)
    if path.is_dir() or path.suffix == ".ryzen":
        from ryzen_compile.numerics.package_candidates import package_candidates

        return package_candidates(path, graph=graph, selector=which)
    if path.suffix == ".onnx" or path.is_file():
        return (onnx_candidate(path),)
    if text in registry.names("recipes"):
        raise UsageError(f"there is no file `{text}`", hint=f"the recipe of that name is spelt recipe:{text}")
    raise UsageError(f"there is no file `{text}`", hint=_USAGE_HINT)


def find_candidate(text: str) -> Candidate:
    """Return the one subject that `text` spells; of a package with one graph, the portable variant.

    Raises UsageError where there are several to choose from.
    """
    found = find_candidates(text)
    if len(found) > 1:
        portable = [one for one in found if one.portable]
        found = tuple(portable) if len(portable) == 1 else found
    if len(found) != 1:
        raise UsageError(
            f"`{text}` holds {len(found)} things to compare with", hint=f"name one: {', '.join(one.name for one in found)}"
        )
    return found[0]


def split_package_reference(text: str) -> tuple[Path, str | None, str | None]:
    """Cut `model.ryzen#graph@variant` behind the longest path that exists, or at the first of the two signs where none does."""
    cuts = [at for at, char in enumerate(text) if char in "#@"] + [len(text)]
    cut = next((at for at in reversed(cuts) if Path(text[:at]).exists()), cuts[0])
    graph, at, which = text[cut:].partition("@")
    return Path(text[:cut]), graph[1:] or None, which if at else None
