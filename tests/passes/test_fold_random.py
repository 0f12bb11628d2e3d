"""Fold on random graphs, and on a decoder as TorchScript exports it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from support.examples import examples
from support.fold_checks import assert_same, fold, ops, run

INT = TensorProto.INT64
SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.5, np.inf]


class GraphGenerator:
    """Generates a random graph with the inputs x and w (N, 3): float tensors of rank 2, int64 vectors of length 2."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.nodes: list[onnx.NodeProto] = []
        self.floats = ["x", "w"]
        self.ints: list[str] = []

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"n{len(self.nodes)}", **attributes))
        return name

    def constant(self, value: Any, dtype: type) -> str:
        return self.add("Constant", value=numpy_helper.from_array(np.array(value, dtype)))

    def random_float(self) -> str:
        return str(self.draw(st.sampled_from(self.floats)))

    def random_int(self) -> str:
        return str(self.draw(st.sampled_from(self.ints))) if self.ints else self.add("Shape", "x")

    def add_random_node(self) -> None:
        kind = self.draw(
            st.sampled_from(
                ["unary", "binary", "scalar", "shape", "arithmetic", "pick", "reshape", "expand", "transpose", "where"]
            )
        )
        getattr(self, f"_{kind}")()

    def _unary(self) -> None:
        op = self.draw(st.sampled_from(["Neg", "Abs", "Identity", "Dropout", "Relu", "Cast"]))
        self.floats.append(self.add(op, self.random_float(), **({"to": TensorProto.FLOAT} if op == "Cast" else {})))

    def _binary(self) -> None:
        # Only tensors with the shape of the inputs: transposed ones have another shape.
        left, right = self.add("Abs", self.draw(st.sampled_from(["x", "w"]))), self.draw(st.sampled_from(["x", "w"]))
        self.floats.append(self.add(self.draw(st.sampled_from(["Add", "Sub", "Mul"])), left, right))

    def _scalar(self) -> None:
        op = self.draw(st.sampled_from(["Add", "Sub", "Mul", "Div"]))
        constant = self.constant(self.draw(st.sampled_from(SPECIAL)), np.float32)
        inputs = [self.random_float(), constant]
        self.floats.append(self.add(op, *(inputs if self.draw(st.booleans()) else inputs[::-1])))

    def _shape(self) -> None:
        self.ints.append(self.add("Shape", self.random_float()))

    def _arithmetic(self) -> None:
        op = self.draw(st.sampled_from(["Add", "Sub", "Mul", "Div"]))
        number = self.constant(self.draw(st.integers(-2, 3).filter(lambda n: n or op != "Div")), np.int64)
        self.ints.append(self.add(op, self.random_int(), number))

    def _pick(self) -> None:
        source, axis = self.random_int(), self.constant([0], np.int64)
        picked = [self.add("Gather", source, self.constant(self.draw(st.integers(-2, 1)), np.int64)) for _ in range(2)]
        self.ints.append(self.add("Concat", *(self.add("Unsqueeze", scalar, axis) for scalar in picked), axis=0))

    def _reshape(self) -> None:
        source = self.random_float()
        shape = self.add("Shape", source)
        if self.draw(st.booleans()):
            flat = self.add("Reshape", source, self.constant([-1], np.int64))
            self.floats.append(self.add("Reshape", flat, shape))
        else:
            axis = self.constant([self.draw(st.integers(0, 2))], np.int64)
            self.floats.append(self.add("Reshape", self.add("Unsqueeze", source, axis), shape))

    def _expand(self) -> None:
        source = self.random_float()
        self.floats.append(self.add("Expand", source, self.add("Shape", source)))

    def _transpose(self) -> None:
        self.floats.append(self.add("Transpose", self.random_float(), **self.draw(st.sampled_from([{}, {"perm": [0, 1]}]))))

    def _where(self) -> None:
        numbers = self.random_int()
        equal = self.add("Equal", numbers, self.constant(self.draw(st.sampled_from([-1, 0, 3])), np.int64))
        self.ints.append(self.add("Where", equal, self.random_int(), numbers))

    def model(self) -> onnx.ModelProto:
        outputs = [(name, TensorProto.FLOAT) for name in self.floats[-3:]] + [(name, INT) for name in self.ints[-2:]]
        computed = [(name, dtype) for name, dtype in dict(outputs).items() if name not in ("x", "w")]
        computed = computed or [(self.add("Neg", "x"), TensorProto.FLOAT)]
        inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3]) for name in ("x", "w")]
        values = [helper.make_tensor_value_info(name, dtype, None) for name, dtype in computed]
        graph = helper.make_graph(self.nodes, "random", inputs, values)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@st.composite
def generated_models(draw: Any) -> onnx.ModelProto:
    generator = GraphGenerator(draw)
    for _ in range(draw(st.integers(1, 12))):
        generator.add_random_node()
    return generator.model()


@settings(max_examples=examples(75), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(generated_models(), st.sampled_from([1, 2, 3, 5]))
def test_a_random_graph_computes_the_same_after_fold(proto: onnx.ModelProto, rows: int) -> None:
    folded, _ = fold(proto)
    values = np.array([[0.0, -0.0, np.nan], [1.5, -np.inf, 1e-40]], np.float32)
    feed = {"x": np.resize(values, (rows, 3)), "w": np.resize(values[::-1] * 2, (rows, 3))}
    assert_same(run(proto, feed), run(folded, feed))
    assert len(folded.graph.node) <= len(proto.graph.node)


@pytest.fixture(scope="module")
def llama() -> ModuleType:
    """Import the synthetic Llama generator of the benchmarks, which are not a package."""
    path = Path(__file__).parents[2] / "benchmarks" / "llama_graph.py"
    spec = importlib.util.spec_from_file_location("llama_graph", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["llama_graph"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("half", [False, True])
def test_a_decoder_without_its_shape_chains_computes_the_same_at_every_size(
    llama: ModuleType, half: bool, tmp_path: Path
) -> None:
    config = llama.SyntheticLlamaConfig(
        layers=2, hidden=48, heads=6, kv_heads=2, intermediate=64, vocabulary=50, positions=64, half=half
    )
    llama.write(config, tmp_path / "decoder.onnx")
    proto = onnx.load(tmp_path / "decoder.onnx")
    folded, _ = fold(proto)
    assert len(proto.graph.node) > 590
    assert len(folded.graph.node) < 195
    op_types = ops(folded)
    assert op_types.count("Shape") <= 3
    assert "ConstantOfShape" not in op_types[60:]
    for batch, seq, past in ((1, 1, 0), (2, 3, 5), (3, 1, 16), (1, 7, 0), (0, 1, 2)):
        feed = llama.make_inputs(config, batch=batch, seq=seq, past=past)
        assert_same(run(proto, feed), run(folded, feed), atol=2e-2 if half else 1e-5)
