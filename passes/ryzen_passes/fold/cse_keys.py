"""What equal constants, and nodes that compute the same, have in common: keys to find them by."""

from __future__ import annotations

from collections.abc import Hashable
from hashlib import blake2b

import onnx_ir as ir

from ryzen_passes.fold.constant_evaluation import MAX_TOTAL_BYTES
from ryzen_passes.fold.value_info import SMALL_CONSTANT_BYTES

NONDETERMINISTIC_OPS = frozenset(
    "Bernoulli Dropout Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike".split()
)
"""Two of them with equal operands give different results."""


def constant_key(tensor: ir.TensorProtocol) -> Hashable:
    """Return a key that equal tensors have in common, and no others; large ones equal themselves only."""
    if tensor.nbytes <= SMALL_CONSTANT_BYTES:
        held = tensor.tobytes()
    elif tensor.nbytes <= MAX_TOTAL_BYTES and isinstance(tensor, ir.Tensor):
        held = blake2b(tensor.tobytes()).digest()  # what was computed here; weights are compared by `duplicates`
    else:
        return ("constant", id(tensor))
    return ("constant", tensor.dtype, tuple(tensor.shape), held)


def expression_key(node: ir.Node) -> Hashable | None:
    """Return a key that nodes computing the same have in common; None where a node has no equal."""
    if node.op_type in NONDETERMINISTIC_OPS:
        return None
    attributes = []
    for name, attribute in sorted(node.attributes.items()):
        value = _attribute_key(attribute)
        if value is None:
            return None
        attributes.append((name, attribute.type, value))
    # An output that is left out has no name, and none to give to another node.
    return (node.op_type, node.inputs, tuple(bool(output.name) for output in node.outputs), tuple(attributes))


def _attribute_key(attribute: ir.Attr) -> Hashable | None:
    kinds = ir.AttributeType
    if attribute.is_ref():
        return ("of the function", attribute.ref_attr_name)
    if attribute.type in (kinds.INT, kinds.STRING):
        return attribute.value  # type: ignore[no-any-return]
    if attribute.type in (kinds.INTS, kinds.STRINGS):
        return tuple(attribute.value)
    if attribute.type is kinds.FLOAT:
        return attribute.as_float().hex()  # 0.0 and -0.0 are equal, and differ
    if attribute.type is kinds.FLOATS:
        return tuple(value.hex() for value in attribute.as_floats())
    if attribute.type is kinds.TENSOR and attribute.value.nbytes <= SMALL_CONSTANT_BYTES:
        return (attribute.value.dtype, tuple(attribute.value.shape), attribute.value.tobytes())
    return None
