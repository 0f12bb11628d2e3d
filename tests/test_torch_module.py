"""Tests of PyTorch modules: what a callable may return, and how a module runs as a baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from ryzen_compile.errors import RyzenError, ShapeError, UsageError
from ryzen_compile.spec.interface import InputSpec, Interface, TensorSpec
from ryzen_compile.torch_module import infer_interface, load_module, make_run_function, to_numpy, to_torch

MODULES = str(Path(__file__).parent / "support" / "torch_modules.py")


@pytest.mark.parametrize("function", ["tagger", "tagger_by_name"])
def test_inputs_are_positional_or_by_name(function: str) -> None:
    loaded = load_module(f"{MODULES}:{function}")
    assert loaded.sample_inputs is not None
    assert list(loaded.sample_inputs) == ["input_ids", "attention_mask"]
    assert not loaded.module.training


def test_callable_can_return_a_module_or_a_recipe() -> None:
    assert load_module(f"{MODULES}:module_alone").sample_inputs is None
    loaded = load_module(f"{MODULES}:recipe")
    assert loaded.recipe is not None
    assert loaded.name == "pair"


def test_module_with_inputs_is_loaded_without_a_file() -> None:
    loaded = load_module((torch.nn.ReLU(), torch.ones(2)))
    assert infer_interface(loaded).outputs == (TensorSpec(name="output", dtype="float32", dims=(2,)),)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("failing", r"failed: RuntimeError: no weights here \(torch_modules.py, line \d+\)"),
        ("wrong", "returned a int\n\nhint: return a Recipe"),
        ("nested", "the input `rest.0` is a list, not a tensor"),
        ("too_many", "2 sample inputs were given, and forward takes 1: x"),
    ],
)
def test_invalid_modules_are_refused(function: str, message: str) -> None:
    with pytest.raises(RyzenError, match=message):
        load_module(f"{MODULES}:{function}")


def test_unknown_recipe_has_a_hint() -> None:
    with pytest.raises(UsageError, match="there is no recipe `minilmm`\n\nhint: did you mean `minilm`"):
        load_module("minilmm")


def test_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"x")
    with pytest.raises(UsageError, match="is a pickle, which runs code when it is read"):
        load_module(str(tmp_path / "weights.pt"))


def test_inputs_of_another_type_are_refused() -> None:
    with pytest.raises(UsageError, match="inputs of type int"):
        load_module((torch.nn.ReLU(), 3))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("returns_nothing", "returns no tensor"),
        ("fails_on_its_sample", "the module fails: RuntimeError: .* cannot be multiplied"),
        ("module_alone", "without sample inputs"),
    ],
)
def test_module_without_inferable_interface_is_refused(function: str, message: str) -> None:
    with pytest.raises(RyzenError, match=message):
        infer_interface(load_module(f"{MODULES}:{function}"))


def make_test_runner(module: torch.nn.Module, *outputs: str, inputs: tuple[str, ...] = ("x",)) -> Any:
    specs = tuple(InputSpec(name=name, dtype="float32", dims=None) for name in inputs)
    return make_run_function(
        module, Interface(inputs=specs, outputs=tuple(TensorSpec(name=n, dtype="float32", dims=None) for n in outputs))
    )


def test_runner_runs_in_eval_mode() -> None:
    module = torch.nn.Sequential(torch.nn.Dropout(0.9), torch.nn.Linear(4, 4)).train()
    run = make_test_runner(module, "y", inputs=("input",))
    first, second = (run({"input": np.ones((2, 4), np.float32)})["y"] for _ in range(2))
    assert np.array_equal(first, second)


def test_outputs_are_named_in_order() -> None:
    class Two(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {"b": x, "a": [x + 1, None]}

    outputs = make_test_runner(Two(), "first", "second")({"x": np.zeros(2, np.float32)})
    assert (outputs["first"].tolist(), outputs["second"].tolist()) == ([0, 0], [1, 1])


def test_wrong_number_of_outputs_is_refused() -> None:
    with pytest.raises(ShapeError, match="the module returns 1 tensors, its interface names 2: y, z"):
        make_test_runner(torch.nn.ReLU(), "y", "z")({"x": np.zeros(2, np.float32)})


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "uint16", "bool"])
def test_conversion_keeps_type_and_bytes(name: str) -> None:
    array = np.array([[0, 1], [1, 0]]).astype(getattr(ml_dtypes, name, name))
    tensor = to_torch(array[:, ::-1])
    assert str(tensor.dtype) == f"torch.{name}"
    converted = to_numpy(tensor)
    assert converted.dtype == array.dtype
    assert converted.tobytes() == array[:, ::-1].tobytes()


def test_tensor_does_not_share_memory_with_its_array() -> None:
    array = np.zeros(2, np.float32)
    to_torch(array).add_(1)
    assert not array.any()


def test_string_array_has_no_tensor() -> None:
    with pytest.raises(ShapeError, match="PyTorch has no strings"):
        to_torch(np.array(["a"]))
