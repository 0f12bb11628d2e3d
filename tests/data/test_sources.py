"""Samples from files, scripts and recipes."""

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


def test_one_npz_is_one_feed(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input_ids=IDS, attention_mask=MASK)
    (feed,) = from_npz(tmp_path / "a.npz", ENCODER)
    assert np.array_equal(feed["input_ids"], IDS)


def test_a_folder_of_npz_is_as_many_feeds_by_name(tmp_path: Path) -> None:
    for at, name in enumerate(("b", "a")):
        np.savez(tmp_path / f"{name}.npz", input_ids=IDS + at, attention_mask=MASK)
    samples = from_npz(tmp_path, ENCODER)
    assert [int(feed["input_ids"][0, 0]) for feed in samples] == [2, 1]
    assert len(list(samples)) == 2, "samples can be read again"


def test_one_axis_more_holds_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input_ids=np.stack([IDS, IDS + 1, IDS + 2]), attention_mask=np.stack([MASK] * 3))
    assert [int(feed["input_ids"][0, 0]) for feed in from_npz(tmp_path / "a.npz", ENCODER)] == [1, 2, 3]


def test_a_multiple_of_a_fixed_batch_is_cut_into_batches(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(18, dtype=np.float32).reshape(6, 3))
    assert [float(feed["x"][0, 0]) for feed in from_npz(tmp_path / "a.npz", FIXED)] == [0, 6, 12]


def test_arrays_that_fit_nothing_are_refused_by_file_and_input(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((5, 3), np.float32))
    with pytest.raises(ShapeError, match=r"a.npz`: axis 0 of the input x: float32\[2, 3\] is 2, got 5"):
        list(from_npz(tmp_path / "a.npz", FIXED))


def test_pickled_objects_are_never_read(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path(tmp_path / "sprung").touch, ())

    np.savez(tmp_path / "a.npz", x=np.array([Trap()], object))
    with pytest.raises(UsageError, match="pickled objects, which are never read"):
        list(from_npz(tmp_path / "a.npz", FIXED))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("data", [b"", b"not an archive", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(UsageError, match="cannot be read as .npz|is not an .npz archive"):
        list(from_npz(tmp_path / "a.npz", FIXED))


def test_a_single_array_is_not_an_archive(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(UsageError, match="is not an .npz archive"):
        list(from_npz(tmp_path / "a.npy", FIXED))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RyzenError, match="there is no file") as missing:
        from_npz(tmp_path / "a.npz", FIXED)
    assert missing.value.exit_code == 1
    with pytest.raises(RyzenError, match="holds no .npz file"):
        from_npz(tmp_path, FIXED)


def test_text_that_is_called_npz_is_not_taken_for_pickled_objects(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_text("x,y\n1,2\n")
    with pytest.raises(UsageError, match="a.npz` is not an .npz archive"):
        list(from_npz(tmp_path / "a.npz", FIXED))


def script(tmp_path: Path, text: str) -> str:
    (tmp_path / "loader.py").write_text(f"import numpy as np\n{text}\n")
    return str(tmp_path / "loader.py")


def test_a_loader_script_yields_feeds_each_time_it_is_asked(tmp_path: Path) -> None:
    path = script(tmp_path, "def load_data():\n    for at in range(3): yield {'x': np.full((2, 3), at, np.float32)}")
    samples = from_script(path, FIXED)
    assert [float(feed["x"][0, 0]) for feed in samples] == [0, 1, 2]
    assert len(list(samples)) == 3


def test_a_loader_function_may_have_another_name(tmp_path: Path) -> None:
    path = script(tmp_path, "def mine():\n    return [{'x': np.zeros((2, 3), np.float32)}]")
    assert len(list(from_script(f"{path}:mine", FIXED))) == 1


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return {'x': np.zeros((2, 3))}", "returned a dict, not a sequence of feeds"),
        ("return 3", "returned a int, not a sequence of feeds"),
        ("return [np.zeros(3)]", "sample 0 is a ndarray, not a dict"),
        ("return []", "holds no sample"),
        ("return [{'x': np.zeros((2, 3))}]", "sample 0: the input .* holds float32, got float64"),
        ("raise ValueError('no data')", r"failed: ValueError: no data \(loader.py, line 2\)"),
        ("yield {'x': np.zeros((2, 3), np.float32)}; 1 / 0", r"failed: ZeroDivisionError: .* \(loader.py, line 2\)"),
    ],
)
def test_a_loader_that_goes_wrong_is_told_where(tmp_path: Path, body: str, says: str) -> None:
    with pytest.raises(RyzenError, match=says):
        list(from_script(script(tmp_path, f"def load_data(): {body}"), FIXED))


def test_a_recipes_samples_are_held_to_its_interface() -> None:
    def recipe(array: np.ndarray) -> Recipe:  # type: ignore[type-arg]
        def none() -> None: ...

        return Recipe(
            name="r", description="", make_module=none, interface=FIXED, samples=lambda seed: [{"x": array + seed}], max_abs=0
        )  # type: ignore[arg-type, return-value]

    (feed,) = from_recipe(recipe(np.zeros((2, 3), np.float32)), seed=4)
    assert (feed["x"] == 4).all()
    with pytest.raises(ShapeError, match="recipe r, seed 0, sample 0: axis 1 of the input"):
        list(from_recipe(recipe(np.zeros((2, 4), np.float32)), seed=0))
