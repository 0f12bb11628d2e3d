"""Tests of arguments of the public functions: models in memory, lists, positions, and errors that name the right spelling."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support import tiny_models

import ryzen_compile as rc
from ryzen_compile.errors import BackendError, ShapeError, UsageError
from ryzen_compile.utils.arguments import _CHECKS

X = np.random.default_rng(0).random((2, tiny_models.WIDTH), np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arguments")
    tiny_models.write(path / "small.onnx")
    rc.build(path / "small.onnx", gpu="cpu", compare=False, cache=False)
    return path


def test_the_version_is_that_of_the_distribution() -> None:
    assert rc.__version__ == __import__("importlib.metadata").metadata.version("ryzen-compile")


@pytest.mark.parametrize("name", [name for name in rc.__all__ if name.islower() and not inspect.ismodule(getattr(rc, name))])
def test_public_names_in_lower_case_are_functions_whose_arguments_are_checked(name: str) -> None:
    import ryzen_compile.evaluation.evaluate
    import ryzen_compile.exporter  # noqa: F401 - a submodule must not replace a function

    function = getattr(rc, name)
    assert inspect.isfunction(function)
    assert function.__wrapped__.__module__ == "ryzen_compile.api"
    with pytest.raises(UsageError, match=f"`{name}` has no argument `progres`") as caught:
        function(progres=None)
    assert "did you mean `progress`?" in str(caught.value) or "progress" not in inspect.signature(function).parameters


def test_every_simple_annotation_of_a_public_function_has_a_check() -> None:
    unchecked = {
        str(parameter.annotation)
        for name in rc.__all__
        if name.islower() and not inspect.ismodule(getattr(rc, name))
        for parameter in inspect.signature(getattr(rc, name)).parameters.values()
        if str(parameter.annotation).removesuffix(" | None") not in _CHECKS
    }
    assert all(
        any(word in annotation for word in ("Literal", "Precision", "Model", "Recipe", "ResourceLimits"))
        for annotation in unchecked
    ), unchecked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpu": None}, "`gpu` must be text or a list of texts"),
        ({"gpu": 3}, r"`gpu` must be text or a list of texts \(got int: 3\)"),
        ({"seed": "1"}, "`seed` must be an integer"),
        ({"seed": True}, "`seed` must be an integer"),
        ({"seed": 1.5}, "`seed` must be an integer"),
        ({"compare": "no"}, "`compare` must be True or False"),
        ({"passes": 3}, "`passes` must be text or a list of texts"),
        ({"options": ["refit"]}, "`options` must be values by option name"),
        ({"max_shapes": (8, 16)}, "`max_shapes` must be shapes by input name"),
        ({"max_shapes": {"x": 8}}, "`max_shapes` must be shapes by input name"),
        ({"memory_limit_bytes": "4GB"}, "`memory_limit_bytes` must be an integer"),
        ({"data": 3}, "`data` must be a path"),
        ({"progress": print}, "`progress` must be an object with the methods `stage` and `report`"),
        ({"precission": "fp16"}, "`build` has no argument `precission`"),
    ],
)
def test_a_wrong_argument_is_a_usage_error(folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rc.build(folder / "small.onnx", **arguments)


@pytest.mark.parametrize("model", [3, None, object()])
def test_what_is_no_model_is_named(model: Any) -> None:
    with pytest.raises(UsageError, match="is not a model"):
        rc.build(model, "m.ryzen")


def test_targets_and_passes_may_be_lists(folder: Path, tmp_path: Path) -> None:
    package = rc.build(folder / "small.onnx", tmp_path / "m.ryzen", gpu=["cpu"], compare=False, cache=False, seed=np.int64(3))
    assert [variant.name for variant in package.manifest.graphs[0].variants] == ["fold"]
    rc.rewrite(folder / "small.onnx", tmp_path / "o.onnx", passes=["fold"])


def test_a_model_in_memory_is_built(folder: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    proto = onnx.load(folder / "small.onnx")
    with rc.load(folder / "small.ryzen") as engine:
        expected = engine(X)
    for model in (proto, ir.from_proto(proto)):
        package = rc.build(model, tmp_path / "m.ryzen", gpu="cpu", cache=False)
        with rc.load(package) as engine:
            np.testing.assert_allclose(engine(X), expected, rtol=1e-6)
    package = rc.build((torch.nn.ReLU(), (torch.ones(2, 3),)), tmp_path / "relu.ryzen", gpu="cpu", cache=False)
    with rc.load(package) as engine:
        assert engine(np.full((2, 3), -1, np.float32)).max() == 0
    with pytest.raises(UsageError, match="has no path for its package"):
        rc.build(proto)
    with pytest.raises(UsageError, match="a ReLU without inputs cannot be exported"):
        rc.build(torch.nn.ReLU(), tmp_path / "m.ryzen")


def test_a_module_without_an_output_is_not_exported() -> None:
    torch = pytest.importorskip("torch")

    class Counting(torch.nn.Module):
        calls = 0

        def forward(self, x: Any) -> Any:
            self.calls += 1
            return x + 1

    module = Counting()
    with pytest.raises(UsageError, match="has no path for its package"):
        rc.build((module, (torch.ones(2, 3),)))
    assert module.calls == 0
    with pytest.raises(UsageError, match="a int is not a model"):
        rc.build(3)  # type: ignore[arg-type]


def test_limits_apply_to_the_export_of_a_module(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    model = (torch.nn.ReLU(), (torch.ones(2, 3),))
    with pytest.raises(BackendError, match="exceeded its limit") as caught:
        rc.build(model, tmp_path / "m.ryzen", gpu="cpu", compare=False, cache=False, memory_limit_bytes=1)
    assert "model.onnx" in caught.value.message
    with pytest.raises(BackendError, match="exceeded its limit"):
        rc.rewrite(model, tmp_path / "m.onnx", passes="fold", memory_limit_bytes=1)
    assert not [*tmp_path.iterdir()]


def test_an_engine_takes_inputs_by_position_or_by_name(folder: Path) -> None:
    with rc.load(folder / "small.ryzen") as engine:
        expected = engine.run(x=X)["y"]
        for outputs in (engine.run(X), engine.run({"x": X}), {"y": engine(X)}, engine.run(X.tolist())):
            np.testing.assert_array_equal(outputs["y"], expected)
        with pytest.raises(ShapeError, match="2 inputs are given by position, and the graph has 1: x"):
            engine.run(X, X)
        with pytest.raises(ShapeError, match="`x` is given by position and by name"):
            engine.run(X, x=X)


def test_a_torch_tensor_of_another_type_has_a_hint_for_torch(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    with rc.load(folder / "small.ryzen") as engine:
        with pytest.raises(ShapeError, match="`x` is bfloat16, expected float32") as caught:
            engine.run(torch.ones(1, tiny_models.WIDTH, dtype=torch.bfloat16))
        assert caught.value.hint == "convert it: x.to(torch.float32)"
        with pytest.raises(ShapeError, match="requires? grad") as caught:
            engine.run(torch.ones(1, tiny_models.WIDTH, requires_grad=True))
        assert caught.value.hint == "pass x.detach()"


def test_results_have_a_short_form_and_one_for_notebooks(folder: Path, tmp_path: Path) -> None:
    package = rc.build(folder / "small.onnx", tmp_path / "m.ryzen", gpu="cpu", cache=False)
    report = rc.compare(package, str(folder / "small.onnx"))
    results: list[Any] = [
        package,
        report,
        rc.verify(package, baseline=str(folder / "small.onnx")),
        rc.bench(package, seconds=0, warm_up_seconds=0),
        rc.rewrite(folder / "small.onnx", tmp_path / "o.onnx", passes="fold"),
    ]
    with rc.load(package) as engine:
        results.append(engine)
        for result in results:
            text = repr(result)
            assert text.startswith(f"<{type(result).__name__} ")
            assert len(text) < 300
            assert f"<b>{type(result).__name__}</b>" in result._repr_html_()
    assert repr(report).startswith("<ComparisonReport MET: ")
    assert "cases in" in report._repr_html_()
