"""Mutated ONNX models, and the commands that read them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]
from onnx import AttributeProto, TensorProto, helper

from fuzzing.runner import FuzzCase
from fuzzing.specimens import node_test_specimens, own_specimens
from fuzzing.values import FLOATS, INTEGERS, NAMES, hostile_json, mutate_bytes, mutate_json

Mutation = Callable[[onnx.ModelProto, random.Random], None]

OWN_SHARE = 0.6
"""The share of specimens of this project; the others are ONNX's node tests."""
_BYTES_SHARE = 0.2
"""The share of mutations that ignore the structure."""
_BUILD = ("build", "m.onnx", "--gpu", "cpu", "--no-cache", "--time-limit", "20", "-q")
_COMMANDS: tuple[tuple[int, tuple[str, ...], tuple[str, ...]], ...] = (
    (40, _BUILD, ("m.ryzen", "m.rejected.ryzen")),
    (10, (*_BUILD, "--no-compare"), ("m.ryzen", "m.rejected.ryzen")),
    (6, (*_BUILD, "--passes", "none"), ("m.ryzen", "m.rejected.ryzen")),
    (10, ("rewrite", "m.onnx", "o.onnx", "-p", "attention{to=tensorrt}", "--backend", "tensorrt-rtx"), ("o.onnx",)),
    (8, ("rewrite", "m.onnx", "o.onnx", "-p", "fold,attention{to=onnx},fold"), ("o.onnx",)),
    (6, ("rewrite", "m.onnx", "o.onnx", "-p", "precision{to=fp16}", "--backend", "tensorrt-rtx"), ("o.onnx",)),
    (5, ("rewrite", "m.onnx", "o.onnx", "-p", "kv-static{capacity=32}"), ("o.onnx",)),
    (3, ("rewrite", "m.onnx", "o", "-p", "kv-static{capacity=32}", "--steps", "1,any"), ("o",)),
    (5, ("explain", "m.onnx", "--gpu", "cpu,sm89"), ()),
    (4, ("inspect", "m.onnx"), ()),
    (3, ("inspect", "m.onnx", "--kv"), ()),
    (3, ("compare", "m.onnx", "--baseline", "source.onnx"), ()),
    (
        2,
        ("build", "m.onnx", "--gpu", "sm89", "--fp16", "--no-cache", "--no-compare", "--time-limit", "30", "-q"),
        ("m.ryzen", "m.rejected.ryzen"),
    ),
)


def make_case(rng: random.Random) -> FuzzCase:
    """Return a command on a mutated model."""
    own = own_specimens()
    source = own[rng.choice(sorted(own))] if rng.random() < OWN_SHARE else rng.choice(node_test_specimens())
    content, note = mutate_model(source, rng)
    _, arguments, outputs = rng.choices(_COMMANDS, [weight for weight, _, _ in _COMMANDS])[0]

    def make_files(folder: Path) -> None:
        (folder / "m.onnx").write_bytes(content)
        (folder / "source.onnx").write_bytes(source)

    return FuzzCase(arguments=arguments, outputs=outputs, note=note, make_files=make_files)


def mutate_model(source: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Return a mutant of a serialized model, and the names of its mutations."""
    try:
        proto = onnx.ModelProto.FromString(source)
    except DecodeError:  # an earlier mutation damaged it
        proto = None
    if proto is None or rng.random() < _BYTES_SHARE:
        content = source
        count = rng.choice((1, 1, 2, 4))
        for _ in range(count):
            content = mutate_bytes(content, rng)
        return content, f"bytes x{count}"
    names = []
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
        mutation = rng.choice(_MUTATIONS)
        try:
            mutation(proto, rng)
        except (ValueError, TypeError, IndexError, UnicodeError):
            continue  # the field does not take the value, or the model has no such part
        names.append(mutation.__name__)
    try:
        return proto.SerializeToString(), ", ".join(names)
    except (EncodeError, UnicodeError):
        return source, "not serializable"


def _graphs(proto: onnx.ModelProto) -> list[onnx.GraphProto]:
    graphs = [proto.graph]
    for graph in graphs:
        for node in graph.node:
            graphs += [attribute.g for attribute in node.attribute if attribute.type == AttributeProto.GRAPH]
    return graphs


def _node(proto: onnx.ModelProto, rng: random.Random) -> onnx.NodeProto:
    nodes = [node for graph in _graphs(proto) for node in graph.node] + [n for f in proto.functions for n in f.node]
    chosen: onnx.NodeProto = rng.choice(nodes)
    return chosen


def _attribute(proto: onnx.ModelProto, rng: random.Random) -> AttributeProto:
    graphs = _graphs(proto)
    attributes = [attribute for graph in graphs for node in graph.node for attribute in node.attribute]
    chosen: AttributeProto = rng.choice(attributes)
    return chosen


def _value(proto: onnx.ModelProto, rng: random.Random) -> onnx.ValueInfoProto:
    graph = rng.choice(_graphs(proto))
    chosen: onnx.ValueInfoProto = rng.choice([*graph.input, *graph.output, *graph.value_info])
    return chosen


def _tensor(proto: onnx.ModelProto, rng: random.Random) -> TensorProto:
    graphs = _graphs(proto)
    tensors = [tensor for graph in graphs for tensor in graph.initializer]
    tensors += [a.t for graph in graphs for node in graph.node for a in node.attribute if a.type == AttributeProto.TENSOR]
    chosen: TensorProto = rng.choice(tensors)
    return chosen


def _value_names(proto: onnx.ModelProto) -> list[str]:
    graphs = _graphs(proto)
    return [name for graph in graphs for node in graph.node for name in (*node.input, *node.output)] + ["", "nowhere"]


def _hostile_attribute(name: str, rng: random.Random) -> AttributeProto:
    tensor = helper.make_tensor("t", rng.choice((1, 7, 9, 10)), [2], [1, 0])
    value: Any = rng.choice(
        (
            rng.choice(INTEGERS),
            rng.choice(FLOATS),
            rng.choice(NAMES),
            b"\xff\xfe",
            [rng.choice(INTEGERS) for _ in range(rng.randrange(1, 6))],
            [rng.choice(FLOATS) for _ in range(rng.randrange(1, 6))],
            [rng.choice(NAMES)],
            tensor,
            [tensor, tensor],
            helper.make_tensor_type_proto(rng.choice((0, 1, 7, 99)), [1]),
            onnx.GraphProto(name="g"),
        )
    )
    return helper.make_attribute(name, value)


def attribute_value(proto: onnx.ModelProto, rng: random.Random) -> None:
    attribute = _attribute(proto, rng)
    kind = attribute.type
    if kind == AttributeProto.INT:
        attribute.i = rng.choice(INTEGERS)
    elif kind == AttributeProto.FLOAT:
        attribute.f = rng.choice(FLOATS)
    elif kind == AttributeProto.STRING:
        attribute.s = rng.choice((*(name.encode() for name in NAMES), b"\xff", b"ij,jk->ik", b"linear", b"SAME_UPPER"))
    elif kind == AttributeProto.INTS and rng.random() < 0.7:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(INTEGERS)
    elif kind == AttributeProto.INTS:
        values = [*attribute.ints, rng.choice(INTEGERS)] if rng.random() < 0.5 else list(attribute.ints)[1:]
        attribute.ints[:] = values
    else:
        attribute.CopyFrom(_hostile_attribute(attribute.name, rng))


def attribute_type(proto: onnx.ModelProto, rng: random.Random) -> None:
    attribute = _attribute(proto, rng)
    attribute.CopyFrom(_hostile_attribute(attribute.name, rng))


def attribute_declared_type(proto: onnx.ModelProto, rng: random.Random) -> None:
    _attribute(proto, rng).type = rng.choice(AttributeProto.AttributeType.values())


def attribute_reference(proto: onnx.ModelProto, rng: random.Random) -> None:
    _attribute(proto, rng).ref_attr_name = rng.choice(NAMES)


def attribute_removed(proto: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(proto, rng)
    del node.attribute[rng.randrange(len(node.attribute))]


def attribute_added(proto: onnx.ModelProto, rng: random.Random) -> None:
    name = rng.choice(("axis", "axes", "to", "perm", "mode", "value", "keepdims", "body", *NAMES))
    _node(proto, rng).attribute.append(_hostile_attribute(name, rng))


def node_removed(proto: onnx.ModelProto, rng: random.Random) -> None:
    graph = rng.choice(_graphs(proto))
    del graph.node[rng.randrange(len(graph.node))]


def node_repeated(proto: onnx.ModelProto, rng: random.Random) -> None:
    graph = rng.choice(_graphs(proto))
    node = onnx.NodeProto()
    node.CopyFrom(rng.choice(graph.node))
    if rng.random() < 0.7:
        node.output[:] = [f"{name}_again" for name in node.output]
    graph.node.insert(rng.randrange(len(graph.node) + 1), node)


def nodes_exchanged(proto: onnx.ModelProto, rng: random.Random) -> None:
    graph = rng.choice(_graphs(proto))
    nodes = list(graph.node)
    rng.shuffle(nodes)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def node_op(proto: onnx.ModelProto, rng: random.Random) -> None:
    ops = sorted({schema.name for schema in onnx.defs.get_all_schemas()})
    _node(proto, rng).op_type = rng.choice((*ops, *NAMES))


def node_domain(proto: onnx.ModelProto, rng: random.Random) -> None:
    _node(proto, rng).domain = rng.choice(("", "ai.onnx", "com.microsoft", "local", "ryzen", "ai.onnx.ml", *NAMES))


def node_names(proto: onnx.ModelProto, rng: random.Random) -> None:
    name = rng.choice(NAMES)
    for graph in _graphs(proto):
        for node in graph.node:
            if rng.random() < 0.5:
                node.name = name


def node_input(proto: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(proto, rng)
    names = _value_names(proto)
    kind = rng.choice(("replace", "replace", "remove", "add", "clear"))
    if kind == "replace":
        node.input[rng.randrange(len(node.input))] = rng.choice(names)
    elif kind == "remove":
        del node.input[rng.randrange(len(node.input))]
    elif kind == "add":
        node.input.extend(rng.choice(names) for _ in range(rng.choice((1, 1, 2, 20))))
    else:
        del node.input[:]


def node_output(proto: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(proto, rng)
    kind = rng.choice(("replace", "remove", "add"))
    if kind == "replace":
        node.output[rng.randrange(len(node.output))] = rng.choice((*_value_names(proto), *NAMES))
    elif kind == "remove":
        del node.output[rng.randrange(len(node.output))]
    else:
        node.output.append(rng.choice((*_value_names(proto), *NAMES)))


def value_renamed_everywhere(proto: onnx.ModelProto, rng: random.Random) -> None:
    old, new = rng.choice(_value_names(proto)), rng.choice(NAMES)
    for graph in _graphs(proto):
        for named in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            if named.name == old:
                named.name = new
        for node in graph.node:
            node.input[:] = [new if name == old else name for name in node.input]
            node.output[:] = [new if name == old else name for name in node.output]


def value_type(proto: onnx.ModelProto, rng: random.Random) -> None:
    value = _value(proto, rng)
    kind = rng.choice(("element", "element", "map", "sequence", "optional", "sparse", "none"))
    if kind == "element":
        value.type.tensor_type.elem_type = rng.choice((*range(25), 99, -1))
    elif kind == "map":
        value.type.map_type.key_type = 7
    elif kind == "sequence":
        value.type.sequence_type.elem_type.tensor_type.elem_type = rng.choice((0, 1, 7))
    elif kind == "optional":
        value.type.optional_type.elem_type.tensor_type.elem_type = 1
    elif kind == "sparse":
        value.type.sparse_tensor_type.elem_type = 1
    else:
        value.ClearField("type")


def value_shape(proto: onnx.ModelProto, rng: random.Random) -> None:
    value = _value(proto, rng)
    shape = value.type.tensor_type.shape
    kind = rng.choice(("dim", "dim", "name", "name", "add", "remove", "rank", "none", "scalar"))
    if kind == "dim":
        rng.choice(shape.dim).dim_value = rng.choice(INTEGERS)
    elif kind == "name":
        rng.choice(shape.dim).dim_param = rng.choice((*NAMES, "N+1", "past+past", "a+", "N*2"))
    elif kind == "add":
        shape.dim.add().dim_value = rng.choice(INTEGERS)
    elif kind == "remove":
        del shape.dim[rng.randrange(len(shape.dim))]
    elif kind == "rank":
        for _ in range(rng.choice((9, 64, 65, 300))):
            shape.dim.add()
    elif kind == "none":
        value.type.tensor_type.ClearField("shape")
    else:
        del shape.dim[:]


def tensor_shape(proto: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(proto, rng)
    if tensor.dims and rng.random() < 0.6:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(INTEGERS)
    else:
        tensor.dims.extend([rng.choice(INTEGERS)] * rng.choice((1, 1, 70)))


def tensor_dtype(proto: onnx.ModelProto, rng: random.Random) -> None:
    _tensor(proto, rng).data_type = rng.choice((*range(25), 99))


def tensor_data(proto: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(proto, rng)
    kind = rng.choice(("bytes", "cut", "float", "int", "values"))
    if kind == "bytes":
        tensor.raw_data = mutate_bytes(tensor.raw_data, rng)
    elif kind == "cut":
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
    elif kind == "float":
        tensor.float_data.extend([rng.choice(FLOATS)])
    elif kind == "int":
        tensor.int64_data.extend([rng.choice(INTEGERS)])
    else:
        size = len(tensor.raw_data)
        tensor.raw_data = (rng.choice(INTEGERS).to_bytes(8, "little", signed=True) * (size // 8 + 1))[:size]


def tensor_location(proto: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(proto, rng)
    if rng.random() < 0.7:
        tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key in ("location", "offset", "length", "checksum"):
        if rng.random() < 0.7:
            text = (
                rng.choice(("m.onnx", "source.onnx", ".", "missing.bin", *NAMES))
                if key == "location"
                else str(rng.choice(INTEGERS))
            )
            tensor.external_data.add(key=key, value=text)


def graph_output(proto: onnx.ModelProto, rng: random.Random) -> None:
    graph = rng.choice(_graphs(proto))
    kind = rng.choice(("remove", "input", "repeat", "inner", "initializer"))
    if kind == "remove":
        del graph.output[rng.randrange(len(graph.output))]
    elif kind == "input":
        graph.output.append(rng.choice(graph.input))
    elif kind == "repeat":
        graph.output.append(rng.choice(graph.output))
    elif kind == "inner":
        graph.output.append(helper.make_tensor_value_info(rng.choice(_value_names(proto)), rng.choice((1, 7)), None))
    else:
        tensor = rng.choice(graph.initializer)
        graph.output.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


def graph_input(proto: onnx.ModelProto, rng: random.Random) -> None:
    graph = rng.choice(_graphs(proto))
    kind = rng.choice(("remove", "repeat", "add", "default"))
    if kind == "remove":
        del graph.input[rng.randrange(len(graph.input))]
    elif kind == "repeat":
        graph.input.append(rng.choice(graph.input))
    elif kind == "add":
        graph.input.append(helper.make_tensor_value_info(rng.choice(NAMES), rng.choice((1, 7, 9, 8)), ["N", 2]))
    else:
        tensor = rng.choice(graph.initializer)
        graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


def input_becomes_constant(proto: onnx.ModelProto, rng: random.Random) -> None:
    value = proto.graph.input.pop(rng.randrange(len(proto.graph.input)))
    dims = [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
    tensor = TensorProto(name=value.name, data_type=value.type.tensor_type.elem_type, dims=dims)
    count = min(abs(math.prod(dims)), 1 << 20)
    tensor.raw_data = rng.choice((bytes(count * 4), bytes(count * 8), b"\xff" * (count * 4)))
    proto.graph.initializer.append(tensor)


def opset(proto: onnx.ModelProto, rng: random.Random) -> None:
    kind = rng.choice(("version", "version", "version", "domain", "remove", "repeat"))
    if kind == "version":
        rng.choice(proto.opset_import).version = rng.choice((*range(1, 30), *INTEGERS))
    elif kind == "domain":
        rng.choice(proto.opset_import).domain = rng.choice(NAMES)
    elif kind == "remove":
        del proto.opset_import[rng.randrange(len(proto.opset_import))]
    else:
        proto.opset_import.append(helper.make_opsetid(rng.choice(("", "ai.onnx", "x")), rng.choice((1, 13, 21))))


def ir_version(proto: onnx.ModelProto, rng: random.Random) -> None:
    proto.ir_version = rng.choice((*range(1, 16), *INTEGERS))


def function(proto: onnx.ModelProto, rng: random.Random) -> None:
    body = rng.choice(proto.functions)
    kind = rng.choice(("recursive", "remove", "rename", "attribute", "repeat", "inputs"))
    if kind == "recursive":
        rng.choice(body.node).op_type, body.node[0].domain = body.name, body.domain
    elif kind == "remove":
        del body.node[rng.randrange(len(body.node))]
    elif kind == "rename":
        body.name = rng.choice(NAMES)
    elif kind == "attribute":
        body.attribute.append(rng.choice(NAMES))
    elif kind == "repeat":
        proto.functions.append(body)
    else:
        body.input.append(rng.choice(NAMES))


def metadata(proto: onnx.ModelProto, rng: random.Random) -> None:
    tensor = {"name": "x", "dtype": "float32", "dims": ["N", 64]}
    interface: Any = {
        "schema_version": 1,
        "inputs": [{**tensor, "role": "values", "low": None, "high": None}],
        "outputs": [{"name": "y", "dtype": "float32", "dims": ["N", 32]}],
        "states": [],
        "batch": "N",
        "typical_sizes": {"N": 4},
    }
    if proto.graph.input and rng.random() < 0.7:
        names = [value.name for value in proto.graph.input]
        interface["inputs"] = [
            {**tensor, "name": name, "role": rng.choice(("ids", "mask", "positions", "values", "state"))} for name in names
        ]
    for _ in range(rng.choice((0, 1, 2))):
        interface = mutate_json(interface, rng)
    text = rng.choice(
        (json.dumps(interface), json.dumps(interface), json.dumps(hostile_json(rng)), rng.choice(NAMES), "[" * 5000)
    )
    proto.metadata_props.add(
        key=rng.choice(("ryzen_compile.interface", "ryzen_compile.interface", "ryzen_compile.kv")), value=text
    )


_MUTATIONS: tuple[Mutation, ...] = (
    attribute_value,
    attribute_value,
    attribute_value,
    attribute_type,
    attribute_declared_type,
    attribute_reference,
    attribute_removed,
    attribute_added,
    node_removed,
    node_repeated,
    nodes_exchanged,
    node_op,
    node_domain,
    node_names,
    node_input,
    node_input,
    node_output,
    value_renamed_everywhere,
    value_type,
    value_type,
    value_shape,
    value_shape,
    value_shape,
    tensor_shape,
    tensor_dtype,
    tensor_data,
    tensor_data,
    tensor_location,
    graph_output,
    graph_input,
    input_becomes_constant,
    opset,
    ir_version,
    function,
    metadata,
)
