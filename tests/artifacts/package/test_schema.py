from __future__ import annotations

import json
from pathlib import Path

from support import sample_package

from ryzen_compile.artifacts.package.schema import schema


def test_the_schema_knows_every_field_that_a_manifest_has(tmp_path: Path) -> None:
    found = json.loads(json.dumps(schema()))
    manifest = json.loads((sample_package.make_package(tmp_path / "m").path / "manifest.json").read_text())
    record = found["$defs"]["Manifest"]
    assert record["additionalProperties"] is False
    assert set(manifest) == set(record["properties"])
    assert record["properties"]["schema_version"] == {"enum": [1]}
    assert found["$defs"]["File"]["properties"]["sha256"]["pattern"] == "^[0-9a-f]{64}$"
