"""Adding to this tree: a member of every group is one file or folder, and no other file changes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from support.doc_pages import ROOT
from support.external_packages import ACME, environment

PACKAGES = ("ryzen_compile", "passes/ryzen_passes", "plugins/ryzen_plugins", "models/ryzen_models")
ADDITIONS = {
    ("passes", "acme-fold-scale"): ("acme_passes/acme_fold_scale.py", "ryzen_passes/acme_fold_scale.py"),
    ("backends", "acme-reference"): (
        "acme_backends/acme_reference.py",
        "ryzen_compile/backends/acme_reference/backend.py",
    ),
    ("kv_scores", "acme-key-max"): ("acme_scores/acme_key_max.py", "ryzen_passes/kv/scorers/acme_key_max.py"),
    ("ops", "axpy"): ("acme_ops/axpy", "ryzen_plugins/axpy"),
    ("recipes", "acme-mlp"): ("acme_recipes/acme_mlp.py", "ryzen_models/acme_mlp.py"),
    ("commands", "acme-weights"): ("acme_commands/acme_weights.py", "ryzen_compile/cli/commands/acme_weights.py"),
}
"""(group, member) -> the sample in tests/acme, and where it is added to a copy of this tree."""


def test_a_file_or_folder_in_this_tree_is_a_member(tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / Path(package).name, ignore=shutil.ignore_patterns("__pycache__"))
    for sample, place in ADDITIONS.values():
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (shutil.copytree if (ACME / sample).is_dir() else shutil.copy)(ACME / sample, tmp_path / place)
    script = (
        "import json, sys; from ryzen_compile import registry; print(json.dumps({g: registry.names(g) for g in sys.argv[1:]}))"
    )
    groups = [group for group, _ in ADDITIONS]
    result = subprocess.run(
        [sys.executable, "-c", script, *groups],
        env=environment(tmp_path, (tmp_path,)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    members = json.loads(result.stdout)
    assert [(group, name) for group, name in ADDITIONS if name not in members[group]] == []
