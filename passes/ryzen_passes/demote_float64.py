"""The pass `demote-float64`: compute float64 in float32, as a backend does that accepts float64 and does not compute in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from ryzen_compile.backends.traits import BackendTraits
from ryzen_compile.spec.fidelity import Fidelity, Tolerance
from ryzen_compile.spec.legalization_pass import GraphContents, LegalizationPass
from ryzen_compile.spec.passes import Change, PassContext, PassEstimate, Refusal
from ryzen_compile.spec.properties import Property
from ryzen_passes.properties import TYPES_NO_FLOAT64

if TYPE_CHECKING:
    import onnx_ir as ir

_CPU_HINT = "build it for the CPU only (--gpu cpu)"


@dataclass(frozen=True, kw_only=True)
class DemoteFloat64(LegalizationPass):
    """Convert every node, weight and subgraph that computes in float64 to float32; inputs and outputs keep their types.

    TensorRT accepts float64 and computes it in float32. The pass states this in the graph, which is then compared with the
    source in float64 under the criteria of fp32: a model that needs float64, such as one that subtracts timestamps, does not
    meet them. Constants beyond the range of float32 are clamped to it, as TensorRT does. KV cache states with a static shape
    become float32.
    """

    name: ClassVar[str] = "demote-float64"
    ensures: ClassVar[frozenset[Property]] = frozenset({TYPES_NO_FLOAT64})

    @classmethod
    def for_backend(cls, traits: BackendTraits, contents: GraphContents) -> Self | None:
        """Return the pass if the backend computes float64 in float32 and the graph contains float64."""
        needed = traits.demoted_dtypes.get("float64") == "float32" and "float64" in contents.element_types
        return cls() if needed else None

    def reason(self, backend: str) -> str:
        """Return why the pass is added."""
        return f"the model contains float64, which {backend} computes in float32"

    @property
    def needs_calibration(self) -> bool:
        """True: the pass warns if the samples say little about real inputs."""
        return True

    @property
    def fidelity(self) -> Fidelity:
        """Within the criteria of fp32."""
        return Tolerance()

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate:
        """Estimate weight bytes: float64 weights halve."""
        import onnx_ir as ir

        tensors = [value.const_value for value in model.graph.initializers.values()]
        float64_bytes = sum(tensor.nbytes for tensor in tensors if tensor is not None and tensor.dtype == ir.DataType.DOUBLE)
        return PassEstimate(weight_bytes=-float64_bytes // 2, reason=f"{float64_bytes} bytes of weights change type")

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        """Convert `model` in place; refuse a BitCast of float64, whose bits float32 does not have."""
        import dataclasses

        import onnx_ir as ir

        from ryzen_compile.ir.edit.fp32_conversion import find_bitcast
        from ryzen_passes.to_fp32 import to_fp32

        float64 = frozenset({ir.DataType.DOUBLE})
        if (bitcast := find_bitcast(model, float64)) is not None:
            return Refusal(
                reason="it uses the bits of a float64 number, which a conversion to float32 does not keep",
                location=bitcast.name or bitcast.op_type,
                hint=_CPU_HINT,
            )
        rounded_inputs = [f"`{value.name}`" for value in model.graph.inputs if _is_read_as_float64(value)]
        change = to_fp32(model, float64, io=False)
        return dataclasses.replace(
            change,
            warnings=_input_warnings(rounded_inputs) if context.samples_origin != "given" else (),
            unmet_hint=f"the model needs float64, which {context.backend} computes in float32: {_CPU_HINT}, or export it "
            "with the float64 part outside of the graph",
        )


def _is_read_as_float64(value: ir.Value) -> bool:
    """Return whether `value` is a float64 input that some node reads without casting it to another type itself."""
    return (
        value.dtype is not None and value.dtype.name == "DOUBLE" and any(node.op_type != "Cast" for node in value.consumers())
    )


def _input_warnings(inputs: list[str]) -> tuple[str, ...]:
    if not inputs:
        return ()
    subject = f"inputs {', '.join(inputs)} are" if len(inputs) > 1 else f"input {inputs[0]} is"
    return (
        f"the float64 {subject} rounded to float32 (7 digits), and the compared values come from a seed: "
        f"compare with real ones (--data), such as timestamps, or {_CPU_HINT}",
    )
