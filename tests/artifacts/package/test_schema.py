"""Tests of the JSON Schema of the manifest."""

from __future__ import annotations

import json
from pathlib import Path

from support import sample_package

from ryzen_compile.artifacts.package.schema import schema


def test_schema_covers_every_field_of_a_manifest(tmp_path: Path) -> None:
    json_schema = json.loads(json.dumps(schema()))
    manifest = json.loads((sample_package.make_package(tmp_path / "m").path / "manifest.json").read_text())
    record = json_schema["$defs"]["Manifest"]
    assert record["additionalProperties"] is False
    assert set(manifest) == set(record["properties"])
    assert record["properties"]["schema_version"] == {"enum": [2]}
    assert json_schema["$defs"]["FileRecord"]["properties"]["sha256"]["pattern"] == "^[0-9a-f]{64}$"
