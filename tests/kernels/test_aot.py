"""Ahead-of-time compilation of every op for every supported compute capability, and caching of compiled kernels."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ryzen_compile import registry
from ryzen_compile.artifacts.cache.store import Store
from ryzen_compile.errors import BackendError, ShapeError, UsageError
from ryzen_compile.kernels import SMS, Specialization, aot, compile_all, is_compiled
from ryzen_compile.kernels.aot import CompiledKernel, source_digest
from ryzen_compile.kernels.specialization import PTX_VERSIONS, typical_specializations
from ryzen_compile.spec.op import Op

OPS = [op for op in registry.ops().values() if op.kernel is not None]
ARCHITECTURES = {75: "sm_75", 80: "sm_80", 86: "sm_86", 89: "sm_89", 90: "sm_90a", 100: "sm_100a", 120: "sm_120a"}
SAMPLE_SMS = (80, 90, 120)
SHARED_BYTES = 48 << 10
"""Shared memory that every launch may use without an opt-in, on every architecture."""


def half_specializations(op: Op) -> Iterator[Specialization]:
    """Yield every tactic of the op in float16, or in its only element type."""
    for specialization in typical_specializations(op):
        if all(
            dtype == "float16" or len(op.type_constraints[variable]) == 1
            for variable, dtype in specialization.type_bindings.items()
        ):
            yield specialization


def first_tactics(op: Op) -> list[Specialization]:
    """Return the first tactic of the op in every element type."""
    return [specialization for specialization in typical_specializations(op) if specialization.tactic == 0]


@pytest.fixture(scope="module")
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with the kernels of the sample. They are compiled together, because starting Triton takes seconds."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    selected = {item.callspec.params["op"].name for item in items if "op" in item.callspec.params}
    ops = [op for op in OPS if op.name in selected]
    store = Store(tmp_path_factory.mktemp("kernels"))
    with suppress(BackendError):  # the test of the op reports it
        compile_all([next(half_specializations(op)) for op in ops], SAMPLE_SMS, store=store)
        compile_all([specialization for op in ops for specialization in first_tactics(op)], [75], store=store)
    return store


def check_kernel(kernel: CompiledKernel, specialization: Specialization, sm: int) -> None:
    assert f".target {ARCHITECTURES[sm]}" in kernel.ptx
    assert f".version {PTX_VERSIONS[sm] // 10}.{PTX_VERSIONS[sm] % 10}" in kernel.ptx
    entry = re.search(rf"\.entry {kernel.name}\((.*?)\)", kernel.ptx, re.DOTALL)
    assert entry is not None
    assert entry[1].count(".param") == specialization.argument_count
    assert kernel.hidden == 2, "Triton appends two pointers to scratch memory"
    assert kernel.cubin[:4] == b"\x7fELF"
    assert kernel.shared_bytes <= SHARED_BYTES
    assert kernel.spilled_bytes <= 16 or sm == 75, "for sm75 Triton has no matrix instructions and unrolls products"
    assert 0 < kernel.registers * kernel.threads <= 65536
    assert kernel.threads == 32 * specialization.options["num_warps"]
    assert not re.search(r"\.file|\.loc|/[a-z]+/.*\.py", kernel.ptx), "the PTX contains paths of the build machine"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tactics", "sms"),
    [
        pytest.param(slice(1), SAMPLE_SMS, id="the first tactic for a sample of sms"),
        pytest.param(slice(None), SMS, id="every tactic for every sm", marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize("op", OPS, ids=lambda op: str(op.name))
def test_tactics_assemble_for_compute_capabilities(op: Op, tactics: slice, sms: Sequence[int], store: Store) -> None:
    specializations = [*half_specializations(op)]
    assert op.kernel is not None
    assert len(specializations) == len(op.kernel.tactics)
    kernels = compile_all(specializations[tactics], sms, store=store)
    assert len(kernels) == len(specializations[tactics]) * len(sms)
    for (index, sm), kernel in kernels.items():
        check_kernel(kernel, specializations[index], sm)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS, ids=lambda op: str(op.name))
def test_every_type_compiles_for_the_oldest_compute_capability(op: Op, store: Store) -> None:
    specializations = first_tactics(op)
    assert len(compile_all(specializations, [75], store=store)) == len(specializations) > 0


OP = registry.find_op("KVAppendEvict")
SMALL = Specialization(
    OP, {"T": "float16"}, {"sinks": 1, "recent": 1, "window": 0}, {"B": 1, "H": 1, "C": 8, "S": 1, "D": 8, "E": 8}
)


def test_a_compiled_kernel_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    assert not is_compiled(SMALL, 89, store)
    kernels = compile_all([SMALL], [89], store=store)
    assert is_compiled(SMALL, 89, store)
    monkeypatch.setattr(aot, "TritonProcess", lambda **_: pytest.fail("the kernel was compiled again"))
    assert compile_all([SMALL], [89], store=store) == kernels


def test_the_digest_depends_on_every_compilation_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def digest_with(**changes: Any) -> str:
        return aot.kernel_digest(dataclasses.replace(SMALL, **changes), 89)

    digests = [
        aot.kernel_digest(SMALL, 89),
        aot.kernel_digest(SMALL, 86),
        digest_with(tactic=1),
        digest_with(type_bindings={"T": "float32"}),
        digest_with(attributes={"sinks": 0, "recent": 1, "window": 0}),
        digest_with(dims={**SMALL.dims, "C": 16}),
        digest_with(dims={**SMALL.dims, "D": 4}),
        digest_with(divisible_by_16=("slots",)),
    ]
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0")
    digests.append(aot.kernel_digest(SMALL, 89))
    assert len({*digests}) == len(digests)


@pytest.mark.parametrize(
    "imports", ["from digested.b import f", "from .b import f", "from . import b", "from digested import b"]
)
def test_the_source_digest_covers_all_modules_of_the_package(
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


def test_the_source_digest_covers_imported_packages_of_other_ops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_environment_variables_do_not_affect_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = compile_all([SMALL], [90], store=None)
    for name in ("DISABLE_LLVM_OPT", "LLVM_EXTRACT_DI_LOCAL_VARIABLES", "TRITON_DEFAULT_FP_FUSION"):
        monkeypatch.setenv(name, "1")
    assert compile_all([SMALL], [90], store=None) == expected


def test_large_output_on_stderr_does_not_block_the_child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text(
        "import sys\nsys.stderr.write('x' * 500_000)\nfrom ryzen_plugins.kv_append_evict.kernel import kv_append_evict\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert OP.kernel is not None
    noisy_op = dataclasses.replace(OP, kernel=dataclasses.replace(OP.kernel, source="noisy:kv_append_evict"))
    assert len(compile_all([dataclasses.replace(SMALL, op=noisy_op)], [89], store=None)) == 1


def test_the_child_does_not_import_from_the_current_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "platform.py").write_text("raise SystemExit('imported from the current folder')\n")
    monkeypatch.chdir(tmp_path)
    assert len(compile_all([SMALL], [89], store=None)) == 1


def test_a_cache_entry_of_another_version_is_recompiled(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.cache_result("kernel", aot.kernel_digest(SMALL, 89), '{"name": "x"}')
    assert not is_compiled(SMALL, 89, store)
    assert compile_all([SMALL], [89], store=store)[0, 89].name == "kv_append_evict"


def test_a_launch_beyond_32_bit_limits_is_rejected() -> None:
    op = registry.find_op("VectorQuantizeFp8")
    with pytest.raises(ShapeError, match="`rows` is 2147483648, which exceeds a 32-bit integer"):
        Specialization(dataclasses.replace(op, dim_limits={}), {"T": "float16"}, {}, {"ROWS": 1 << 31, "D": 128})
    with pytest.raises(ShapeError, match="4294836225 programs along x exceed the maximum of 2147483647"):
        Specialization(OP, {"T": "float16"}, {"sinks": 1, "recent": 1, "window": 0}, {**SMALL.dims, "B": 65535, "H": 65535})


def test_a_child_leaves_no_temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    compile_all([SMALL], [89], store=None)
    assert [*tmp_path.iterdir()] == []


def test_an_unsupported_compute_capability_is_rejected() -> None:
    with pytest.raises(UsageError, match="kernels are not compiled for sm70"):
        compile_all([SMALL], [70], store=None)


def test_a_missing_triton_is_reported_with_the_package_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(aot, "triton_version", lambda: None)
    assert not is_compiled(SMALL, 89, Store(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(BackendError, match="kernels need `triton`, which is not installed") as caught:
        compile_all([SMALL], [89], store=None)
    assert caught.value.hint == "pip install 'ryzen-compile[kernels]'"


def test_a_crash_of_the_child_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text("import os\nos.write(2, b'last words\\n')\nos._exit(7)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert OP.kernel is not None
    broken = dataclasses.replace(OP, kernel=dataclasses.replace(OP.kernel, source="dies:kernel"))
    with pytest.raises(
        BackendError, match=r"cannot be compiled for sm89: the process that runs Triton died \(exit 7\): last words"
    ):
        compile_all([dataclasses.replace(SMALL, op=broken)], [89], store=None)
