"""Build errors: what the parser and the builder report, reduced to the node, its op type and the reason."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ryzen_compile.backends.nvinfer.builder_log import BuilderLog
from ryzen_compile.errors import BackendError
from ryzen_compile.processes.crash_breadcrumb import ChildOutput

_MAX_NODES = 3
"""The maximum number of nodes that a message lists."""
_UNINFORMATIVE_LINE = re.compile(r"^Invalid Node - |checkMacros\.cpp|^Internal Error: MyelinCheckException")
_SOURCE_LOCATION = re.compile(r"\s+In [\w:]+(?:\(\))? at /[^\s)]+:\d+")
_ERROR_CODE = re.compile(r"^(?:\[[^\]]*\] )?(?:\w+::\w+: )?Error Code \d+: [\w ]+\((.*?)\)?$")
_MYELIN_PREFIX = re.compile(r"^\[[^\]]*\] (?:\w+: )?(?:\S+\.cpp:\d+: )?(?:CHECK\(.*?\) failed\. )?")
_FAILED_CONDITION = re.compile(
    r"^(?:Parameter check failed, condition: |Assertion (?:failed: )?)?.*[=!<>(|&].*?(?:\.|:) (?=[A-Z])"
)
_QUOTED_MESSAGE = re.compile(r'&& "(.*)"$')
_DLA_ADVICE = re.compile(r"\s*Please set k\w+ [^.]*\bDLA\b[^.]*\.?")
"""Advice on the accelerator DLA, which no target of this project has."""
_QUANTIZED_OP = re.compile(r"^(Q[A-Z]|Dynamic)|Quantize|Integer|NBits")
"""The names of quantized ops: QLinearConv, QAttention, DynamicQuantizeLSTM, MatMulIntegerToFloat, MatMulNBits."""
_GROUPED_ATTENTION_HINT = (
    "the kv passes replace it by standard ops: ryzen-compile rewrite MODEL NEW --passes 'kv-static{capacity=4096}'"
)
_GENERATED_NODE_NAME = re.compile(r"^node_of_\S+: ")


_SHAPES_HINT = "the shapes contradict each other: give consistent --min-shapes, --opt-shapes and --max-shapes"
_BRANCH_SHAPES_HINT = (
    "both branches of an If must run at the shapes: give --min-shapes, --opt-shapes and --max-shapes with which they do, or "
    "leave them out: they are derived so"
)


def parse_error(product: str, onnx_path: str, parser: Any, log: BuilderLog, child_output: ChildOutput) -> BackendError:
    """Return the error of a graph that the parser rejected; `product` is the name of the library."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    if not errors:
        reason = _failure_reason(log, child_output)
        return BackendError(f"{product} cannot read the graph: {reason}", may_be_one_target=False)
    inputs = [error.file() for error in errors if error.func() == "importInput"]
    if inputs:
        return BackendError(
            f"{product} does not support the type of {_format_inputs(onnx_path, inputs)}{_format_consumers(onnx_path, inputs)}",
            hint="cast it to float32, float16, bfloat16, int64, int32 or bool before it enters the graph",
            may_be_one_target=False,
        )
    error = errors[0]
    name, op = log.last_node
    if not op:
        output = f" ({child_output.tail()})" if child_output.tail() else ""
        return BackendError(f"{product} cannot read the graph: {clean_message(error.desc())}{output}", may_be_one_target=False)
    if error.node_operator() and error.node_operator() != op:
        name, op = f"#{error.node()}", error.node_operator()
    reason = clean_message(error.desc())
    hint = "build the model before it was quantized" if _QUANTIZED_OP.search(op) else None
    hint = _GROUPED_ATTENTION_HINT if op == "GroupQueryAttention" else hint
    if reason == "false" or reason.startswith("Plugin not found") or "plugin" in reason.lower():
        message = f"{product} does not support node `{error.node_name() or name}` [{op}]"
        return BackendError(message, hint=hint, may_be_one_target=False)
    message = f"{product} rejects node `{error.node_name() or name}` [{op}]: {reason}"
    return BackendError(message, hint=hint, may_be_one_target=False)


def build_error(product: str, log: BuilderLog, child_output: ChildOutput) -> BackendError:
    """Return the error of a graph that was parsed and could not be built."""
    reason = _failure_reason(log, child_output)
    words = set(re.findall(r"\w+", reason))
    named_nodes = [name for name in log.op_types if name in reason]
    failed_nodes = named_nodes or [name for name, op in log.op_types.items() if op in words]
    location = _format_nodes({name: log.op_types[name] for name in failed_nodes}) or _all_nodes_if_few(log)
    hint = None
    if "Attention" in words:
        hint = "run the pass `attention`, without strict=true: it decomposes an attention that has no fused kernel"
    elif "violate shape constraints" in reason or "from an empty axis" in reason:
        hint = _BRANCH_SHAPES_HINT if "If" in log.op_types.values() else _SHAPES_HINT
    return BackendError(f"{product} cannot build the graph{location}: {reason}", hint=hint)


def config_error(product: str, log: BuilderLog, child_output: ChildOutput) -> BackendError:
    """Return the error of options or targets that the builder rejected."""
    return BackendError(f"{product} rejects the options or the targets: {_failure_reason(log, child_output)}")


def shape_tensor_error(product: str, onnx_path: str, name: str) -> BackendError:
    """Return the error of an input `name` whose values are sizes, which the builder would have to know."""
    return BackendError(
        f"{product} needs the values of the input `{name}` at build time because they are sizes"
        f"{_format_consumers(onnx_path, [name])}; a profile specifies shapes, not values",
        hint=f"make `{name}` a constant of the graph",
        may_be_one_target=False,
    )


def clean_message(text: str) -> str:
    """Return a message of the library without source locations, error codes and failed conditions."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    text = next((line for line in lines if not _UNINFORMATIVE_LINE.search(line)), lines[0] if lines else "")
    text = _DLA_ADVICE.sub("", _SOURCE_LOCATION.sub("", text))
    if match := _ERROR_CODE.match(text):
        text = match[1]
    text = _MYELIN_PREFIX.sub("", text)
    if match := _QUOTED_MESSAGE.search(text):
        return match[1]
    text = _GENERATED_NODE_NAME.sub("", text.partition("  (See ")[0])
    return _FAILED_CONDITION.sub("", text).strip() or text


def _failure_reason(log: BuilderLog, child_output: ChildOutput) -> str:
    messages = [clean_message(message) for message in log.errors]
    return (
        "; ".join(dict.fromkeys(filter(None, messages)))
        or clean_message(child_output.tail())
        or "the library reports no reason"
    )


def _format_inputs(onnx_path: str, inputs: Sequence[str]) -> str:
    """Return inputs with their types: `x` (int16), `items` (sequence)."""
    import onnx

    types = {value.name: value.type for value in onnx.load(onnx_path, load_external_data=False).graph.input}
    formatted = []
    for name in inputs:
        kind = str(types[name].WhichOneof("value"))
        element = onnx.TensorProto.DataType.Name(types[name].tensor_type.elem_type).lower()
        formatted.append(f"`{name}` ({element if kind == 'tensor_type' else kind.removesuffix('_type')})")
    return f"input{'s' if len(formatted) > 1 else ''} {', '.join(formatted)}"


def _all_nodes_if_few(log: BuilderLog) -> str:
    return _format_nodes(log.op_types) if len(log.op_types) <= _MAX_NODES else ""


def _format_consumers(onnx_path: str, inputs: Sequence[str]) -> str:
    """Return the nodes that read `inputs`, from the ONNX file without its weights: the library does not report them."""
    import onnx

    nodes = onnx.load(onnx_path, load_external_data=False).graph.node
    consumers = {node.name or f"node_of_{node.output[0]}": node.op_type for node in nodes if set(inputs) & set(node.input)}
    return _format_nodes(consumers) or ", which no node reads"


def _format_nodes(op_types: Mapping[str, str]) -> str:
    listed = ", ".join(f"`{name}` [{op}]" for name, op in list(op_types.items())[:_MAX_NODES])
    omitted = f" and {len(op_types) - _MAX_NODES} more" if len(op_types) > _MAX_NODES else ""
    return f", at node{'s' if len(op_types) > 1 else ''} {listed}{omitted}" if op_types else ""
