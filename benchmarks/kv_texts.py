"""The texts on which KV methods are measured: of four kinds, in files that this repository and its pinned packages bring."""

from __future__ import annotations

import pydoc_data.topics
import re
from collections.abc import Callable
from importlib.metadata import metadata
from pathlib import Path

import click
import onnx

_ROOT = Path(__file__).parents[1]


def literature() -> str:
    """Return chapters of "Persuasion" by Jane Austen."""
    return (_ROOT / "models" / "ryzen_models" / "tinylm" / "persuasion.txt").read_text(encoding="utf-8")


def reference() -> str:
    """Return the documentation of ONNX's operators, in the order of their names."""
    schemas = sorted(onnx.defs.get_all_schemas(), key=lambda schema: (schema.domain, schema.name))
    return "\n\n".join(f"{schema.name}\n{(schema.doc or '').strip()}" for schema in schemas)


def code() -> str:
    """Return Python modules of click."""
    return "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(click.__file__).parent.glob("*.py")))


def descriptions() -> str:
    """Return the descriptions of the packages in constraints.txt, in its order, each cut after 20,000 characters."""
    lines = (_ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    packages = [match[1] for line in lines if (match := re.match(r"([\w-]+)==", line))]
    return "\n\n".join(f"{name}\n{str(metadata(name).json.get('description', ''))[:20000]}" for name in packages)


KINDS: dict[str, Callable[[], str]] = {
    "literature": literature,
    "reference": reference,
    "code": code,
    "descriptions": descriptions,
}


def calibration() -> str:
    """Return the topics of Python's help, which are none of the measured texts, for scores that are fitted."""
    return "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
