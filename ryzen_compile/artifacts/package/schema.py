"""The JSON Schema of a package manifest, for readers that do not use ryzen-compile."""

from __future__ import annotations

from typing import Any

import msgspec

from ryzen_compile.artifacts.package.manifest import SCHEMA_VERSION, Manifest


def schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of `manifest.json`."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"ryzen-compile package manifest, version {SCHEMA_VERSION}",
        **msgspec.json.schema(Manifest),
    }
