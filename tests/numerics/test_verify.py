"""The check again, where the package is: which graph is compared with what, and what is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import tiny_models

from ryzen_compile.cli.main import run
from ryzen_compile.errors import UsageError
from ryzen_compile.numerics.verify import parse_baselines, verify
from ryzen_compile.progress import SilentProgress


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages of one graph and of two, built for the CPU, beside the models they are made of."""
    place = tmp_path_factory.mktemp("verify")
    a, b = tiny_models.write(place / "a.onnx"), tiny_models.write(place / "b.onnx", seed=1)
    for words in ([str(a), "-o", str(place / "one.ryzen")], [f"a={a}", f"b={b}", "-o", str(place / "two.ryzen")]):
        assert run(["build", *words, "--gpu", "cpu", "--cache", str(place / "cache"), "-q"]) == 0
    return place


def verified(package: Path, baseline: str | dict[str, str] | None) -> dict[str, tuple[str, bool]]:
    """Return for each graph that was compared what it was compared with, and whether it met its criteria."""
    _, results = verify(package, baseline=baseline, data=None, criteria=None, seed=0, progress=SilentProgress())
    return {one.candidate.rpartition("@")[0].rpartition("#")[2]: (Path(one.baseline).name, one.met) for one in results}


def accuracies(package: Path) -> dict[str, list[Any]]:
    graphs = json.loads((package / "manifest.json").read_text())["graphs"]
    return {graph["name"]: [one for variant in graph["variants"] for one in variant["accuracy"]] for graph in graphs}


def test_each_graph_is_compared_with_its_own_baseline(folder: Path) -> None:
    package = folder / "two.ryzen"
    before = accuracies(package)
    baselines = {name: str(folder / f"{name}.onnx") for name in "ab"}
    assert verified(package, baselines) == {"a": ("a.onnx", True), "b": ("b.onnx", True)}
    after = accuracies(package)
    for name in "ab":
        assert len(after[name]) == len(before[name]) + 1
        assert after[name][-1]["baseline"].startswith(f"{name}.onnx")
        assert after[name][-1]["met"]


def test_a_graph_without_a_baseline_is_not_held_to_that_of_another(folder: Path) -> None:
    package = folder / "two.ryzen"
    before = accuracies(package)
    assert verified(package, {"a": str(folder / "a.onnx")}) == {"a": ("a.onnx", True)}
    assert accuracies(package)["b"] == before["b"]


def test_one_baseline_for_several_graphs_is_refused_and_nothing_is_recorded(folder: Path) -> None:
    package = folder / "two.ryzen"
    before = (package / "manifest.json").read_bytes()
    with pytest.raises(UsageError, match="cannot be the baseline of 2 graphs") as caught:
        verified(package, str(folder / "a.onnx"))
    assert caught.value.hint == f"say of which: a={folder / 'a.onnx'} or b={folder / 'a.onnx'}"
    with pytest.raises(UsageError, match="holds no graph `c`"):
        verified(package, {"a": str(folder / "a.onnx"), "c": str(folder / "b.onnx")})
    assert (package / "manifest.json").read_bytes() == before


def test_the_one_graph_of_a_package_takes_a_plain_baseline_and_a_named_one(folder: Path) -> None:
    package = folder / "one.ryzen"
    (name,) = accuracies(package)
    for baseline in (str(folder / "a.onnx"), {name: str(folder / "a.onnx")}):
        ((against, met),) = verified(package, baseline).values()
        assert (against, met) == ("a.onnx", True)


def test_baselines_are_spelt_by_graph_on_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package, a, b = folder / "two.ryzen", folder / "a.onnx", folder / "b.onnx"
    assert run(["verify", str(package), "--baseline", f"a={a}", "--baseline", f"b={b}", "-q"]) == 0
    assert run(["verify", str(package), "--baseline", f"a={b}", "-q"]) == 1
    capsys.readouterr()
    assert run(["verify", str(package), "--baseline", str(a), "-q"]) == 2
    told = capsys.readouterr().err
    assert "cannot be the baseline of 2 graphs" in told
    assert f"a={a}" in told


def test_a_baseline_is_read_with_the_name_of_its_graph(tmp_path: Path) -> None:
    assert parse_baselines(()) is None
    assert parse_baselines(("model.onnx",)) == "model.onnx"
    assert parse_baselines(("a=model.onnx", "b=recipe:minilm")) == {"a": "model.onnx", "b": "recipe:minilm"}
    odd = tmp_path / "a=b.onnx"
    odd.write_bytes(b"")
    assert parse_baselines((str(odd),)) == str(odd)
    with pytest.raises(UsageError, match=r"`other.onnx` names no graph"):
        parse_baselines(("a=model.onnx", "other.onnx"))
    with pytest.raises(UsageError, match="the graph `a` is given two baselines"):
        parse_baselines(("a=model.onnx", "a=other.onnx"))
