"""Tests that malicious packages and packed packages are refused with limited time and memory, as README.md lists them."""

from __future__ import annotations

import os
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from attacks import hostile
from support import sample_package

from ryzen_compile.artifacts.package.pack import pack, unpack
from ryzen_compile.artifacts.package.read import read_package
from ryzen_compile.cli.main import run
from ryzen_compile.errors import PackageError

MAX_SECONDS = 10.0
MAX_MEMORY_BYTES = 600 << 20


@contextmanager
def resource_limits() -> Iterator[None]:
    """Limit the time and the memory of the block."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    started = time.monotonic()
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MAX_MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.monotonic() - started < MAX_SECONDS


@pytest.mark.parametrize("attack", hostile.ON_FOLDERS, ids=lambda attack: attack.__name__)
def test_malicious_package_is_refused(tmp_path: Path, attack: hostile.Attack) -> None:
    (tmp_path / hostile.SECRET).write_bytes(b"untouched")
    path = sample_package.make_package(tmp_path / "m.ryzen").path
    attack(path)
    with resource_limits(), pytest.raises(PackageError) as caught:
        read_package(path).check()
    assert "\x1b" not in str(caught.value)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("command", ["bench", "run", "inspect", "verify", "evaluate", "pack"])
def test_no_command_reads_a_huge_manifest(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = sample_package.make_package(tmp_path / "m.ryzen").path
    os.truncate(path / "manifest.json", 1 << 40)
    baseline = ["--baseline", "recipe:tinylm"] if command == "evaluate" else []
    with resource_limits():
        assert run([command, str(path), *baseline]) == 1
    assert "it has more than 67108864 bytes" in capsys.readouterr().err


def test_package_is_valid_before_the_attack(tmp_path: Path) -> None:
    read_package(sample_package.make_package(tmp_path / "m.ryzen").path).check()


@pytest.mark.parametrize("attack", hostile.ON_TARS, ids=lambda attack: attack.__name__)
def test_malicious_tar_is_refused_and_leaves_nothing(tmp_path: Path, attack: hostile.Attack) -> None:
    (tmp_path / hostile.SECRET).write_bytes(b"untouched")
    file = pack(sample_package.make_package(tmp_path / "m.ryzen"), tmp_path / "m.tar")
    attack(file)
    before = sorted(os.listdir(tmp_path))
    with resource_limits(), pytest.raises(PackageError) as caught:
        unpack(file, tmp_path / "n.ryzen")
    assert "\n" not in caught.value.message
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / hostile.SECRET).read_bytes() == b"untouched"


def test_readme_lists_every_attack_with_its_countermeasure() -> None:
    text = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    attacks = (*hostile.ON_FOLDERS, *hostile.ON_TARS)
    listed = re.findall(r"^(\d+)\. `(\w+)`: .+\. .+\.$", text, re.MULTILINE)
    assert listed == [(str(number), attack.__name__) for number, attack in enumerate(attacks, 1)]
