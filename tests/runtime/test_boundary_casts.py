"""Casts at the boundary of an engine that computes float64 inputs and outputs in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import backend_graphs

from ryzen_compile.backends.onnxruntime.backend import BACKEND
from ryzen_compile.errors import ShapeError
from ryzen_compile.runtime.boundary_casts import with_boundary_casts
from ryzen_compile.spec.interface import InputSpec, Interface, StateSpec, TensorSpec

DEMOTED = {"float64": "float32"}
STEP = """
<ir_version: 10, opset_import: ["" : 21]>
step (float[B,1] x, float[B,1] past, int64[B] n) => (float[B,1] y, float[B,1] present, int64[B] m)
{ y = Add (x, past)  present = Identity (y)  m = Identity (n) }
"""
"""A graph that a backend made of float64: the session has float32."""


def interface(dtype: str) -> Interface:
    def spec(name: str) -> TensorSpec:
        return TensorSpec(name=name, dtype="int64" if name in "nm" else dtype, dims=("B",) if name in "nm" else ("B", 1))

    return Interface(
        inputs=tuple(InputSpec(name=name, dtype=spec(name).dtype, dims=spec(name).dims) for name in ("x", "past", "n")),
        outputs=tuple(map(spec, ("y", "present", "m"))),
        states=(StateSpec(name="sum", input="past", output="present"),),
    )


@pytest.fixture
def graph(tmp_path: Path) -> str:
    return backend_graphs.save_graph(STEP, tmp_path / "step.onnx")


def test_inputs_and_outputs_have_the_types_of_the_interface(graph: str) -> None:
    with BACKEND.open(graph) as opened:
        session = with_boundary_casts(opened, interface("float64"), DEMOTED)
        assert [spec.dtype for spec in session.inputs] == ["float64", "float32", "int64"]
        outputs = session.run({"x": np.full((2, 1), 0.1), "past": np.zeros((2, 1), np.float32), "n": np.arange(2)})
        assert [outputs[name].dtype.name for name in ("y", "present", "m")] == ["float64", "float32", "int64"]
        np.testing.assert_array_equal(outputs["y"], np.full((2, 1), np.float32(0.1), np.float64))


def test_an_input_of_another_type_than_that_of_the_interface_is_refused(graph: str) -> None:
    with BACKEND.open(graph) as opened:
        session = with_boundary_casts(opened, interface("float64"), DEMOTED)
        rest = {"past": np.zeros((2, 1), np.float32), "n": np.arange(2)}
        with pytest.raises(ShapeError, match="`x` is float32, expected float64"):
            session.run({"x": np.zeros((2, 1), np.float32), **rest})
        with pytest.raises(ShapeError, match="there is no input `z`"):
            session.run({"z": np.zeros((2, 1)), **rest})


def test_steps_over_states_are_cast_too_and_the_states_are_not(graph: str) -> None:
    with BACKEND.open(graph) as opened:
        session = with_boundary_casts(opened, interface("float64"), DEMOTED)
        states = interface("float64").states
        binding = session.bind_states(states, {"past": (2, 1)})
        shared = session.bind_states(states, {"past": (2, 1)}, share_with=binding)
        for steps in (binding, shared):
            outputs = steps.run({"x": np.ones((2, 1)), "n": np.arange(2)})
        assert outputs["y"].dtype == np.float64
        np.testing.assert_array_equal(outputs["y"], [[2], [2]])
        assert binding.read("sum").dtype == np.float32
        binding.close()


def test_torch_tensors_are_cast(graph: str) -> None:
    torch = pytest.importorskip("torch")
    with BACKEND.open(graph) as opened:
        session = with_boundary_casts(opened, interface("float64"), DEMOTED)
        inputs = {"x": torch.ones(2, 1, dtype=torch.float64), "past": torch.zeros(2, 1), "n": torch.arange(2)}
        assert session.run(inputs)["y"].dtype == np.float64


def test_a_session_of_the_types_of_the_interface_is_unchanged(graph: str) -> None:
    with BACKEND.open(graph) as opened:
        assert with_boundary_casts(opened, interface("float32"), DEMOTED) is opened
        assert with_boundary_casts(opened, interface("float64"), {}) is opened
