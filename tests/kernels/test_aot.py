"""Kernels ahead of time: every op for every GPU generation, on this machine, once."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ryzen_compile import registry
from ryzen_compile.artifacts.cache.store import Store
from ryzen_compile.errors import BackendError, ShapeError, UsageError
from ryzen_compile.kernels import SMS, Specialization, aot, compile_all, is_compiled
from ryzen_compile.kernels.aot import source_digest
from ryzen_compile.kernels.specialization import PTX_VERSIONS, typical_specializations
from ryzen_compile.spec.op import Op

OPS = [op for op in registry.ops().values() if op.kernel is not None]
ARCHITECTURES = {75: "sm_75", 80: "sm_80", 86: "sm_86", 89: "sm_89", 90: "sm_90a", 100: "sm_100a", 120: "sm_120a"}
SHARED_BYTES = 48 << 10
"""What a launch may have without asking for more, on every generation."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("kernels"))


def halves(op: Op) -> Iterator[Specialization]:
    """Yield every tactic of the op in half precision, or in its only type."""
    for instance in typical_specializations(op):
        if all(element == "float16" or len(op.type_constraints[name]) == 1 for name, element in instance.type_bindings.items()):
            yield instance


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS, ids=lambda op: str(op.name))
def test_every_tactic_assembles_for_every_generation(op: Op, store: Store) -> None:
    instances = [*halves(op)]
    assert len(instances) == len(op.kernel.tactics) if op.kernel else 0
    found = compile_all(instances, SMS, store=store)
    assert len(found) == len(instances) * len(SMS)
    for (index, sm), kernel in found.items():
        assert f".target {ARCHITECTURES[sm]}" in kernel.ptx
        assert f".version {PTX_VERSIONS[sm] // 10}.{PTX_VERSIONS[sm] % 10}" in kernel.ptx
        entry = re.search(rf"\.entry {kernel.name}\((.*?)\)", kernel.ptx, re.DOTALL)
        assert entry is not None
        assert entry[1].count(".param") == instances[index].argument_count
        assert kernel.hidden == 2, "Triton appends two pointers to scratch memory"
        assert kernel.cubin[:4] == b"\x7fELF"
        assert kernel.shared_bytes <= SHARED_BYTES
        assert kernel.spilled_bytes <= 16 or sm == 75, "for sm75 Triton has no matrix instructions, and unrolls products"
        assert 0 < kernel.registers * kernel.threads <= 65536
        assert kernel.threads == 32 * instances[index].options["num_warps"]
        assert not re.search(r"\.file|\.loc|/[a-z]+/.*\.py", kernel.ptx), "the PTX names files of the machine that made it"


@pytest.mark.parametrize("op", OPS, ids=lambda op: str(op.name))
def test_every_type_compiles_for_the_oldest_generation(op: Op, store: Store) -> None:
    first = [instance for instance in typical_specializations(op) if instance.tactic == 0]
    assert len(compile_all(first, [75], store=store)) == len(first) > 0


OP = registry.find_op("KVAppendEvict")
SMALL = Specialization(OP, {"T": "float16"}, {"sinks": 1, "recent": 1}, {"B": 1, "H": 1, "C": 8, "S": 1, "D": 8, "E": 8})


def test_a_kernel_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    assert not is_compiled(SMALL, 89, store)
    made = compile_all([SMALL], [89], store=store)
    assert is_compiled(SMALL, 89, store)
    monkeypatch.setattr(aot, "TritonProcess", lambda **_: pytest.fail("it was compiled again"))
    assert compile_all([SMALL], [89], store=store) == made


def test_all_that_decides_a_kernel_is_in_its_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(**changes: Any) -> str:
        return aot.kernel_digest(dataclasses.replace(SMALL, **changes), 89)

    known = [
        aot.kernel_digest(SMALL, 89),
        aot.kernel_digest(SMALL, 86),
        other(tactic=1),
        other(elements={"T": "float32"}),
        other(attributes={"sinks": 0, "recent": 1}),
        other(dims={**SMALL.dims, "C": 16}),
        other(dims={**SMALL.dims, "D": 4}),
        other(multiples=("slots",)),
    ]
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0")
    known.append(aot.kernel_digest(SMALL, 89))
    assert len({*known}) == len(known)


@pytest.mark.parametrize(
    "imports", ["from digested.b import f", "from .b import f", "from . import b", "from digested import b"]
)
def test_a_digest_of_sources_sees_whatever_the_package_imports_of_its_own(
    imports: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "digested"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text(f"import math\n{imports}\n")
    (package / "b.py").write_text("f = 1\n")

    def digest() -> str:
        source_digest.cache_clear()
        return source_digest("digested.a")

    first = digest()
    assert digest() == first
    (package / "b.py").write_text("f = 2\n")
    assert digest() != first


def test_a_digest_of_sources_sees_the_other_packages_of_ops_that_are_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text in {"one": "from other.keys import f\n", "other": "f = 1\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
        (tmp_path / name / "keys.py").write_text(text)
    monkeypatch.setattr(registry, "provider_packages", lambda group: ["one", "other"])

    def digest() -> str:
        source_digest.cache_clear()
        return source_digest("one.keys")

    first = digest()
    (tmp_path / "other" / "keys.py").write_text("f = 2\n")
    assert digest() != first


def test_the_shell_does_not_decide_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = compile_all([SMALL], [90], store=None)
    for name in ("DISABLE_LLVM_OPT", "LLVM_EXTRACT_DI_LOCAL_VARIABLES", "TRITON_DEFAULT_FP_FUSION"):
        monkeypatch.setenv(name, "1")
    assert compile_all([SMALL], [90], store=None) == plain


def test_a_kernel_that_talks_much_does_not_stop_the_child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "talks.py").write_text(
        "import sys\nsys.stderr.write('x' * 500_000)\nfrom ryzen_plugins.kv_append_evict.kernel import kv_append_evict\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert OP.kernel is not None
    talking = dataclasses.replace(OP, kernel=dataclasses.replace(OP.kernel, source="talks:kv_append_evict"))
    assert len(compile_all([dataclasses.replace(SMALL, op=talking)], [89], store=None)) == 1


def test_the_child_does_not_import_from_the_current_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "platform.py").write_text("raise SystemExit('imported from the current folder')\n")
    monkeypatch.chdir(tmp_path)
    assert len(compile_all([SMALL], [89], store=None)) == 1


def test_what_another_version_kept_is_made_anew(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.cache_result("kernel", aot.kernel_digest(SMALL, 89), '{"name": "x"}')
    assert not is_compiled(SMALL, 89, store)
    assert compile_all([SMALL], [89], store=store)[0, 89].name == "kv_append_evict"


def test_a_launch_that_no_32_bits_describe_is_refused() -> None:
    op = registry.find_op("VectorQuantizeFp8")
    with pytest.raises(ShapeError, match="`rows` comes to 2147483648, which no 32-bit integer holds"):
        Specialization(dataclasses.replace(op, dim_limits={}), {"T": "float16"}, {}, {"ROWS": 1 << 31, "D": 128})
    with pytest.raises(ShapeError, match="4294836225 programs along x, and a launch has at most 2147483647"):
        Specialization(OP, {"T": "float16"}, {"sinks": 1, "recent": 1}, {**SMALL.dims, "B": 65535, "H": 65535})


def test_nothing_of_a_child_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    compile_all([SMALL], [89], store=None)
    assert [*tmp_path.iterdir()] == []


def test_a_gpu_that_is_not_known_is_refused() -> None:
    with pytest.raises(UsageError, match="kernels are not compiled for sm70"):
        compile_all([SMALL], [70], store=None)


def test_without_triton_the_refusal_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(aot, "triton_version", lambda: None)
    assert not is_compiled(SMALL, 89, Store(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(BackendError, match="kernels need `triton`, which is not installed") as caught:
        compile_all([SMALL], [89], store=None)
    assert caught.value.hint == "pip install 'ryzen-compile[kernels]'"


def test_a_child_that_dies_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text("import os\nos.write(2, b'at the end\\n')\nos._exit(7)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert OP.kernel is not None
    broken = dataclasses.replace(OP, kernel=dataclasses.replace(OP.kernel, source="dies:kernel"))
    with pytest.raises(
        BackendError, match=r"cannot be compiled for sm89: the process that runs Triton died \(exit 7\): at the end"
    ):
        compile_all([dataclasses.replace(SMALL, op=broken)], [89], store=None)
