"""Keys for common subexpression elimination: equal constants have equal keys, and so do equivalent nodes."""

from __future__ import annotations

from collections.abc import Hashable
from hashlib import blake2b

import onnx_ir as ir

from ryzen_compile.ir.analysis.op_traits import NONDETERMINISTIC_OPS
from ryzen_compile.ir.analysis.value_info import SMALL_CONSTANT_BYTES
from ryzen_passes.fold.constant_evaluation import MAX_TOTAL_BYTES


def constant_key(tensor: ir.TensorProtocol) -> Hashable:
    """Return a key that is equal for equal tensors only; a large weight equals only itself."""
    if tensor.nbytes <= SMALL_CONSTANT_BYTES:
        contents = tensor.tobytes()
    elif tensor.nbytes <= MAX_TOTAL_BYTES and isinstance(tensor, ir.Tensor):
        # A tensor that fold computed; weights are compared in `duplicate_weights`.
        contents = blake2b(tensor.tobytes()).digest()
    else:
        return ("constant", id(tensor))
    return ("constant", tensor.dtype, tuple(tensor.shape), contents)


def expression_key(node: ir.Node) -> Hashable | None:
    """Return a key that is equal for nodes that compute the same outputs; None for a node without a comparable key."""
    if node.op_type in NONDETERMINISTIC_OPS:
        return None
    attributes = []
    for name, attribute in sorted(node.attributes.items()):
        value = _attribute_key(attribute)
        if value is None:
            return None
        attributes.append((name, attribute.type, value))
    # An omitted output has an empty name, so it cannot replace the output of another node.
    return (node.op_type, node.inputs, tuple(bool(output.name) for output in node.outputs), tuple(attributes))


def _attribute_key(attribute: ir.Attr) -> Hashable | None:
    types = ir.AttributeType
    if attribute.is_ref():
        return ("reference", attribute.ref_attr_name)
    if attribute.type in (types.INT, types.STRING):
        return attribute.value  # type: ignore[no-any-return]
    if attribute.type in (types.INTS, types.STRINGS):
        return tuple(attribute.value)
    if attribute.type is types.FLOAT:
        return attribute.as_float().hex()  # 0.0 == -0.0, but they are different values
    if attribute.type is types.FLOATS:
        return tuple(value.hex() for value in attribute.as_floats())
    if attribute.type is types.TENSOR and attribute.value.nbytes <= SMALL_CONSTANT_BYTES:
        return (attribute.value.dtype, tuple(attribute.value.shape), attribute.value.tobytes())
    return None
