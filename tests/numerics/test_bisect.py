"""Bisection: deliberately wrong passes, and a graph in which one node overflows in half precision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from ryzen_compile.numerics.bisect import Divergence, bisect, find_divergence
from ryzen_compile.numerics.criteria import default_criteria
from ryzen_compile.numerics.grid import CaseSource
from ryzen_compile.numerics.onnx_candidates import onnx_candidate
from ryzen_compile.progress import SilentProgress
from ryzen_compile.spec.passes import Change, Pass, PassContext, PassEstimate

CHAIN = """
<ir_version: 10, opset_import: ["" : 21]>
chain (float[batch, 4] x) => (float[batch, 4] y) <float[4] w = {1.0, 2.0, 3.0, 4.0}, float[4] b = {0.5, 0.5, 0.5, 0.5}> {
  [scale] s = Mul (x, w)
  [shift] t = Add (s, b)
  [squash] u = Tanh (t)
  [side] v = Abs (x)
  [join] y = Add (u, v)
}
"""

OVERFLOW = """
<ir_version: 10, opset_import: ["" : 21]>
overflow (float[batch, 4] x) => (float[batch, 4] y) <float thousand = {1000.0}> {
  [twice] d = Add (x, x)
  [square] q = Mul (x, x)
  [shrink] r = Div (q, thousand)
  [end] y = Add (r, d)
}
"""


@dataclass(frozen=True, kw_only=True)
class Idle(Pass):
    """A correct pass: it renames a node."""

    name: ClassVar[str] = "idle"

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate:
        return PassEstimate()

    def rewrite(self, model: ir.Model, context: PassContext) -> Change:
        node = model.graph[-1]
        node.name = f"{node.name}_"
        return Change(changed=(node.name,), summary="renamed")


@dataclass(frozen=True, kw_only=True)
class ScaleWeight(Idle):
    """A faulty pass: it scales a weight."""

    name: ClassVar[str] = "scale-weight"

    def rewrite(self, model: ir.Model, context: PassContext) -> Change:
        weight = model.graph.initializers["w"]
        assert weight.const_value is not None
        weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1.25), name="w")
        return Change(changed=("scale",), summary="one weight is scaled")


@dataclass(frozen=True, kw_only=True)
class Rename(Idle):
    """A correct pass: it renames a tensor."""

    name: ClassVar[str] = "rename"

    def rewrite(self, model: ir.Model, context: PassContext) -> Change:
        model.graph[0].outputs[0].name = "renamed"
        return Change(changed=("scale",), summary="one tensor is renamed")


@dataclass(frozen=True, kw_only=True)
class DropAdd(Idle):
    """A faulty pass: it removes an Add."""

    name: ClassVar[str] = "drop-add"

    def rewrite(self, model: ir.Model, context: PassContext) -> Change:
        node = next(node for node in model.graph if node.name == "shift")
        source = node.inputs[0]
        assert source is not None
        node.outputs[0].replace_all_uses_with(source)
        model.graph.remove(node, safe=True)
        return Change(removed=("shift",), summary="one Add is removed")


@dataclass(frozen=True, kw_only=True)
class Halve(Idle):
    """Converts every float to float16."""

    name: ClassVar[str] = "halve"

    def rewrite(self, model: ir.Model, context: PassContext) -> Change:
        for value in (
            *model.graph.inputs,
            *model.graph.initializers.values(),
            *(out for node in model.graph for out in node.outputs),
        ):
            value.type = ir.TensorType(ir.DataType.FLOAT16)
            if value.const_value is not None:
                value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=value.name)
        return Change(changed=tuple(str(node.name) for node in model.graph), summary="all tensors are float16")


def run_bisect(tmp_path: Path, text: str, *passes: Pass, low: float = 1.0, high: float = 2.0) -> Divergence:
    model = ir.from_proto(onnx.parser.parse_model(text))
    source = tmp_path / "source.onnx"
    ir.save(model, source)
    rng = np.random.default_rng(0)
    return bisect(
        source,
        passes,
        baseline=onnx_candidate(source),
        context=PassContext(backend="onnxruntime"),
        properties=(),
        criteria=default_criteria(),
        case_source=CaseSource(inputs=[{"x": rng.uniform(low, high, (batch, 4)).astype(np.float32)} for batch in (1, 3)]),
        progress=SilentProgress(),
    )


def test_a_scaled_weight_is_found_with_its_pass_and_its_node(tmp_path: Path) -> None:
    result = run_bisect(tmp_path, CHAIN, Idle(), ScaleWeight(), Idle())
    assert (result.after_pass, result.pass_number, result.case) == ("scale-weight", 2, "sample 1 1x4")
    assert result.divergent_node is not None
    assert (result.divergent_node.node, result.divergent_node.op_type, result.divergent_node.tensor) == ("scale", "Mul", "s")
    assert "max_abs of `s`" in result.divergent_node.message
    assert result.message == "after `scale-weight`, pass 2 of 3, the outputs diverge, first at `s`, computed by `scale` (Mul)"


def test_tensors_are_compared_with_those_before_the_faulty_pass(tmp_path: Path) -> None:
    result = run_bisect(tmp_path, CHAIN, Rename(), ScaleWeight())
    assert result.divergent_node is not None
    assert result.divergent_node.tensor == "renamed"
    assert result.divergent_node.unmeasured_nodes == ()


def test_nodes_whose_outputs_cannot_be_compared_are_listed(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class RenameAndScale(ScaleWeight):
        def rewrite(self, model: ir.Model, context: PassContext) -> Change:
            Rename().rewrite(model, context)
            return super().rewrite(model, context)

    result = run_bisect(tmp_path, CHAIN, RenameAndScale())
    assert result.divergent_node is not None
    assert (result.divergent_node.tensor, result.divergent_node.unmeasured_nodes) == ("t", ("scale (Mul)",))
    assert result.message.endswith("first at `t`, computed by `shift` (Add), or by one of the new nodes before it: scale (Mul)")


def test_a_removed_node_is_found_at_the_next_tensor_in_both_graphs(tmp_path: Path) -> None:
    result = run_bisect(tmp_path, CHAIN, Idle(), DropAdd())
    assert result.after_pass == "drop-add"
    assert result.divergent_node is not None
    assert (result.divergent_node.node, result.divergent_node.tensor) == ("squash", "u")


def test_the_node_that_overflows_in_half_precision_is_found(tmp_path: Path) -> None:
    result = run_bisect(tmp_path, OVERFLOW, Halve(), low=290, high=310)
    assert result.after_pass == "halve"
    assert result.comparison.precision == "fp16"
    assert result.divergent_node is not None
    assert (result.divergent_node.node, result.divergent_node.op_type) == ("square", "Mul")
    assert "infinity" in result.divergent_node.message


def test_half_precision_without_overflow_does_not_diverge(tmp_path: Path) -> None:
    result = run_bisect(tmp_path, OVERFLOW, Halve())
    assert (result.after_pass, result.pass_number, result.divergent_node) == (None, None, None)
    assert result.comparison.met
    assert result.message == "the criteria are met after each of 1 passes"


def test_no_pass_is_blamed_for_a_divergent_source(tmp_path: Path) -> None:
    source, other = tmp_path / "source.onnx", tmp_path / "other.onnx"
    ir.save(ir.from_proto(onnx.parser.parse_model(CHAIN)), source)
    ir.save(ir.from_proto(onnx.parser.parse_model(CHAIN.replace("Tanh", "Sigmoid"))), other)
    result = bisect(
        source,
        [ScaleWeight()],
        baseline=onnx_candidate(other),
        context=PassContext(backend="onnxruntime"),
        properties=(),
        criteria=default_criteria(),
        progress=SilentProgress(),
    )
    assert (result.after_pass, result.pass_number, result.comparison.met) == (None, None, False)
    assert result.message.startswith("the source itself diverges from the baseline: ")
    assert result.message.endswith("; no pass is to blame")


def save_model(path: Path, text: str) -> Path:
    ir.save(ir.from_proto(onnx.parser.parse_model(text)), path)
    return path


OTHER_BIAS = CHAIN.replace("b = {0.5,", "b = {0.75,")


def test_a_source_that_diverges_from_its_baseline_is_reported_with_the_node(tmp_path: Path) -> None:
    source, other = save_model(tmp_path / "source.onnx", CHAIN), save_model(tmp_path / "other.onnx", OTHER_BIAS)
    common: Any = {
        "context": PassContext(backend="onnxruntime"),
        "properties": (),
        "criteria": default_criteria(),
        "progress": SilentProgress(),
    }
    result = bisect(source, [Idle()], baseline=onnx_candidate(other), baseline_file=other, **common)
    assert (result.pass_number, result.comparison.met) == (None, False)
    assert ", first at `t`, computed by `shift` (Add); no pass is to blame" in result.message
    result = bisect(other, [Idle()], baseline=onnx_candidate(other), baseline_file=other, packaged_graph=source, **common)
    assert result.message.startswith("the source itself diverges from the baseline: ")
    assert result.divergent_node is not None
    assert result.divergent_node.node == "shift"
    assert "max_abs of `t`" in result.divergent_node.message


def test_two_onnx_files_are_compared_tensor_by_tensor(tmp_path: Path) -> None:
    candidate, baseline = save_model(tmp_path / "one.onnx", OTHER_BIAS), save_model(tmp_path / "other.onnx", CHAIN)
    result = find_divergence(candidate, baseline, criteria=default_criteria(), progress=SilentProgress())
    assert result.divergent_node is not None
    assert (result.after_pass, result.divergent_node.node, result.divergent_node.tensor) == (None, "shift", "t")
    assert result.message.endswith("first at `t`, computed by `shift` (Add); there are no passes to blame")
    assert find_divergence(candidate, candidate, criteria=default_criteria(), progress=SilentProgress()).divergent_node is None


MASKED = """
<ir_version: 10, opset_import: ["" : 21]>
masked (float[batch, 4] x) => (float[batch, 4] y)
<float least = {-1.0e38}, float[4] m = {0.0, 0.0, 0.0, 1.0}, float[4] w = {1.0, 2.0, 3.0, 4.0}> {
  [mask] a = Mul (m, least)
  [masked] s = Add (x, a)
  [softmax] p = Softmax <axis = -1> (s)
  [weigh] y = Mul (p, w)
}
"""


BRANCHES = """
<ir_version: 10, opset_import: ["" : 21]>
branches (float[batch, 4] x) => (float[batch, 4] y) <float[4] w = {1.0, 2.0, 3.0, 4.0}, bool yes = {1}> {
  [scale] s = Mul (x, w)
  [choose] c = If (yes) <
    then_branch = then () => (float[batch, 4] t) { t = Neg (s) },
    else_branch = else () => (float[batch, 4] e) { e = Abs (x) }
  >
  [end] y = Tanh (c)
}
"""


@dataclass(frozen=True, kw_only=True)
class ClampAndScale(ScaleWeight):
    """A faulty pass: it weakens the mask, which is harmless, and scales a weight, which is not."""

    name: ClassVar[str] = "clamp-and-scale"

    def rewrite(self, model: ir.Model, context: PassContext) -> Change:
        model.graph.initializers["least"].const_value = ir.tensor(np.float32(-1e4), name="least")
        return super().rewrite(model, context)


def test_a_difference_that_vanishes_downstream_is_not_blamed(tmp_path: Path) -> None:
    result = run_bisect(tmp_path, MASKED, ClampAndScale())
    assert result.divergent_node is not None
    assert result.divergent_node.node == "weigh"


def test_the_chain_is_followed_through_subgraphs(tmp_path: Path) -> None:
    result = run_bisect(tmp_path, BRANCHES, ScaleWeight(), low=0.1, high=0.2)
    assert result.divergent_node is not None
    assert result.divergent_node.node == "scale"


@pytest.mark.parametrize("tensors_per_run", [1, 2, 100])
def test_the_result_does_not_depend_on_the_number_of_tensors_per_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors_per_run: int
) -> None:
    monkeypatch.setattr("ryzen_compile.numerics.tensor_diff.TENSORS_PER_RUN", tensors_per_run)
    result = run_bisect(tmp_path, CHAIN, ScaleWeight())
    assert result.divergent_node is not None
    assert result.divergent_node.tensor == "s"
