"""Tests of samples from files, scripts and recipes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.interfaces import ENCODER

from ryzen_compile.data.sources import from_npz, from_recipe, from_script
from ryzen_compile.errors import RyzenError, ShapeError, UsageError
from ryzen_compile.spec.interface import InputSpec, Interface
from ryzen_compile.spec.recipe import Recipe

IDS, MASK = np.array([[1, 2, 3], [4, 5, 0]]), np.array([[1, 1, 1], [1, 1, 0]])
FIXED = Interface(inputs=(InputSpec(name="x", dtype="float32", dims=(2, 3)),), outputs=())


def test_npz_file_is_one_sample(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input_ids=IDS, attention_mask=MASK)
    (sample,) = from_npz(tmp_path / "a.npz", ENCODER)
    assert np.array_equal(sample["input_ids"], IDS)


def test_folder_of_npz_files_is_one_sample_per_file_in_name_order(tmp_path: Path) -> None:
    for offset, name in enumerate(("b", "a")):
        np.savez(tmp_path / f"{name}.npz", input_ids=IDS + offset, attention_mask=MASK)
    samples = from_npz(tmp_path, ENCODER)
    assert [int(sample["input_ids"][0, 0]) for sample in samples] == [2, 1]
    assert len(list(samples)) == 2, "samples can be iterated repeatedly"


def test_additional_axis_holds_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input_ids=np.stack([IDS, IDS + 1, IDS + 2]), attention_mask=np.stack([MASK] * 3))
    assert [int(sample["input_ids"][0, 0]) for sample in from_npz(tmp_path / "a.npz", ENCODER)] == [1, 2, 3]


def test_multiple_of_a_fixed_batch_is_split_into_batches(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(18, dtype=np.float32).reshape(6, 3))
    assert [float(sample["x"][0, 0]) for sample in from_npz(tmp_path / "a.npz", FIXED)] == [0, 6, 12]


def test_arrays_of_a_wrong_size_are_refused_with_file_and_input(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((5, 3), np.float32))
    with pytest.raises(ShapeError, match=r"a.npz`: axis 0 of the input x: float32\[2, 3\] is 2, got 5"):
        list(from_npz(tmp_path / "a.npz", FIXED))


def test_the_number_of_batches_in_a_file_is_bounded(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((2 * 1_000_001, 0), np.float32))
    empty = Interface(inputs=(InputSpec(name="x", dtype="float32", dims=(2, "n")),), outputs=())
    with pytest.raises(ShapeError, match="is 2, got 2000002"):
        next(iter(from_npz(tmp_path / "a.npz", empty)))


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    class MaliciousObject:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path(tmp_path / "executed").touch, ())

    np.savez(tmp_path / "a.npz", x=np.array([MaliciousObject()], object))
    with pytest.raises(UsageError, match="contains pickled objects, which are rejected"):
        list(from_npz(tmp_path / "a.npz", FIXED))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("data", [b"", b"not an archive", b"PK\x03\x04 cut off"])
def test_invalid_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(UsageError, match="cannot be read as .npz|is not an .npz archive"):
        list(from_npz(tmp_path / "a.npz", FIXED))


def test_npy_file_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(UsageError, match="is not an .npz archive"):
        list(from_npz(tmp_path / "a.npy", FIXED))


def test_missing_file_and_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RyzenError, match="there is no file") as missing:
        from_npz(tmp_path / "a.npz", FIXED)
    assert missing.value.exit_code == 1
    with pytest.raises(RyzenError, match="contains no .npz files"):
        from_npz(tmp_path, FIXED)


def test_text_file_with_npz_suffix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_text("x,y\n1,2\n")
    with pytest.raises(UsageError, match="a.npz` is not an .npz archive"):
        list(from_npz(tmp_path / "a.npz", FIXED))


def write_script(tmp_path: Path, text: str) -> str:
    (tmp_path / "loader.py").write_text(f"import numpy as np\n{text}\n")
    return str(tmp_path / "loader.py")


def test_loader_script_can_be_iterated_repeatedly(tmp_path: Path) -> None:
    path = write_script(tmp_path, "def load_data():\n    for i in range(3): yield {'x': np.full((2, 3), i, np.float32)}")
    samples = from_script(path, FIXED)
    assert [float(sample["x"][0, 0]) for sample in samples] == [0, 1, 2]
    assert len(list(samples)) == 3


def test_loader_function_can_have_another_name(tmp_path: Path) -> None:
    path = write_script(tmp_path, "def mine():\n    return [{'x': np.zeros((2, 3), np.float32)}]")
    assert len(list(from_script(f"{path}:mine", FIXED))) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return {'x': np.zeros((2, 3))}", r"must return a sequence of samples \(got dict\)"),
        ("return 3", r"must return a sequence of samples \(got int\)"),
        ("return [np.zeros(3)]", r"sample 0 must be a dict \(got ndarray\)"),
        ("return []", "contains no samples"),
        ("return [{'x': np.zeros((2, 3))}]", "sample 0: the input .* has element type float32, got float64"),
        ("raise ValueError('no data')", r"failed: ValueError: no data \(loader.py, line 2\)"),
        ("yield {'x': np.zeros((2, 3), np.float32)}; 1 / 0", r"failed: ZeroDivisionError: .* \(loader.py, line 2\)"),
    ],
)
def test_failing_loader_is_reported_with_its_location(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(RyzenError, match=message):
        list(from_script(write_script(tmp_path, f"def load_data(): {body}"), FIXED))


def test_samples_of_a_recipe_are_validated() -> None:
    def recipe(array: np.ndarray) -> Recipe:  # type: ignore[type-arg]
        def make_module() -> None: ...

        return Recipe(
            name="r",
            description="",
            make_module=make_module,
            interface=FIXED,
            samples=lambda seed: [{"x": array + seed}],
            max_abs=0,
        )  # type: ignore[arg-type, return-value]

    (sample,) = from_recipe(recipe(np.zeros((2, 3), np.float32)), seed=4)
    assert (sample["x"] == 4).all()
    with pytest.raises(ShapeError, match="recipe r, seed 0, sample 0: axis 1 of the input"):
        list(from_recipe(recipe(np.zeros((2, 4), np.float32)), seed=0))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("yield {1: 2}", r"sample 0: the name of an input must be a string \(got int\)"),
        ("yield {'x': [[1, 2], [3]]}", "sample 0: the input .* cannot be converted to an array: ValueError: .*inhomogeneous"),
        ("return Hostile()", r"failed: ZeroDivisionError: division by zero \(loader.py, line 4\)"),
        ("yield Hostile()", r"sample 0 must be a dict \(got Hostile\)"),
        ("yield {'x': Hostile()}", r"cannot be converted to an array: ZeroDivisionError: .*\(loader.py, line 6\)"),
        ("raise Unprintable", "failed: Unprintable: its message cannot be printed"),
        ("raise GeneratorExit", "failed: GeneratorExit"),
        ("raise SystemExit(3)", "failed: SystemExit: 3"),
        (r"raise ValueError('\x1b[2J' * 999)", r"failed: ValueError: \\x1b\[2J"),
        ("load_data()", "failed: RecursionError"),
    ],
)
def test_hostile_loader_is_reported(tmp_path: Path, body: str, message: str) -> None:
    classes = """class Hostile:
    def __iter__(self):
        return iter([1 / 0])
    def __array__(self, *args, **kwargs):
        return 1 / 0
class Unprintable(BaseException):
    __str__ = None"""
    with pytest.raises(RyzenError, match=message) as caught:
        list(from_script(write_script(tmp_path, f"{classes}\ndef load_data(): {body}"), FIXED))
    assert len(caught.value.message) < 2000
    assert caught.value.message.isprintable()
