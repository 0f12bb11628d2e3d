"""Why an engine was not built, in the graph's own words: the node, its op, the reason without the library's source lines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ryzen_compile.backends.nvinfer.builder_log import BuilderLog
from ryzen_compile.backends.process.crash_breadcrumb import ChildOutput
from ryzen_compile.errors import BackendError

_MAX_NODES = 3
"""Up to how many nodes a graph is told by all of them where the library names none."""
_UNINFORMATIVE_LINE = re.compile(r"^Invalid Node - |checkMacros\.cpp|^Internal Error: MyelinCheckException")
_SOURCE_LOCATION = re.compile(r"\s+In [\w:]+(?:\(\))? at /[^\s)]+:\d+")
_ERROR_CODE = re.compile(r"^(?:\[[^\]]*\] )?(?:\w+::\w+: )?Error Code \d+: [\w ]+\((.*?)\)?$")
_MYELIN_PREFIX = re.compile(r"^\[[^\]]*\] (?:\w+: )?(?:\S+\.cpp:\d+: )?(?:CHECK\(.*?\) failed\. )?")
_FAILED_CONDITION = re.compile(
    r"^(?:Parameter check failed, condition: |Assertion (?:failed: )?)?.*[=!<>(|&].*?(?:\.|:) (?=[A-Z])"
)
_QUOTED_MESSAGE = re.compile(r'&& "(.*)"$')
_GENERATED_NODE_NAME = re.compile(r"^node_of_\S+: ")


def parse_error(product: str, onnx_path: str, parser: Any, log: BuilderLog, child_output: ChildOutput) -> BackendError:
    """Return why the graph could not be imported."""
    errors = [parser.get_error(at) for at in range(parser.num_errors)]
    if not errors:
        return BackendError(f"{product} cannot read the graph: {_failure_reason(log, child_output)}")
    inputs = [error.file() for error in errors if error.func() == "importInput"]
    if inputs:
        return BackendError(
            f"{product} does not know the type of {_format_inputs(onnx_path, inputs)}{_format_consumers(onnx_path, inputs)}",
            hint="cast it to float32, float16, bfloat16, int64, int32 or bool in front of the graph",
        )
    error = errors[0]
    name, op = log.last_node
    if not op:
        also = f" ({child_output.tail()})" if child_output.tail() else ""
        return BackendError(f"{product} cannot read the graph: {clean_message(error.desc())}{also}")
    if error.node_operator() and error.node_operator() != op:
        name, op = f"#{error.node()}", error.node_operator()
    reason = clean_message(error.desc())
    if reason == "false" or reason.startswith("Plugin not found") or "plugin" in reason.lower():
        return BackendError(f"{product} does not know node `{error.node_name() or name}` [{op}]")
    return BackendError(f"{product} refuses node `{error.node_name() or name}` [{op}]: {reason}")


def build_error(product: str, log: BuilderLog, child_output: ChildOutput) -> BackendError:
    """Return why the imported graph could not be built."""
    reason = _failure_reason(log, child_output)
    words = set(re.findall(r"\w+", reason))
    named = [name for name in log.op_types if name in reason]
    meant = named or [name for name, op in log.op_types.items() if op in words]
    where = _format_nodes({name: log.op_types[name] for name in meant}) or _all_nodes_if_few(log)
    hint = None
    if "Attention" in words:
        hint = "run the pass `attention`, not strict: where there is no fused kernel, an attention is then built of others"
    elif "violate shape constraints" in reason:
        hint = "the shapes do not go together: give --min-shapes, --opt-shapes and --max-shapes that do"
    return BackendError(f"{product} cannot build the graph{where}: {reason}", hint=hint)


def config_error(product: str, log: BuilderLog, child_output: ChildOutput) -> BackendError:
    """Return what is against the options or the targets."""
    return BackendError(f"{product} refuses the options or the targets: {_failure_reason(log, child_output)}")


def shape_tensor_error(product: str, onnx_path: str, name: str) -> BackendError:
    """Return that the values of the input `name` would have to be known."""
    return BackendError(
        f"{product} needs to know the values of the input `{name}`, which are sizes{_format_consumers(onnx_path, [name])}, "
        "and a profile only has shapes",
        hint=f"make `{name}` a constant of the graph",
    )


def clean_message(text: str) -> str:
    """Return what a message of the library says, without where in its sources it says it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    text = next((line for line in lines if not _UNINFORMATIVE_LINE.search(line)), lines[0] if lines else "")
    text = _SOURCE_LOCATION.sub("", text)
    if found := _ERROR_CODE.match(text):
        text = found[1]
    text = _MYELIN_PREFIX.sub("", text)
    if found := _QUOTED_MESSAGE.search(text):
        return found[1]
    text = _GENERATED_NODE_NAME.sub("", text.partition("  (See ")[0])
    return _FAILED_CONDITION.sub("", text).strip() or text


def _failure_reason(log: BuilderLog, child_output: ChildOutput) -> str:
    said = [clean_message(message) for message in log.errors]
    return "; ".join(dict.fromkeys(filter(None, said))) or clean_message(child_output.tail()) or "it gives no reason"


def _format_inputs(onnx_path: str, inputs: Sequence[str]) -> str:
    """Tell inputs with their types: `x` (int16), `items` (sequence)."""
    import onnx

    types = {value.name: value.type for value in onnx.load(onnx_path, load_external_data=False).graph.input}
    told = []
    for name in inputs:
        kind = str(types[name].WhichOneof("value"))
        element = onnx.TensorProto.DataType.Name(types[name].tensor_type.elem_type).lower()
        told.append(f"`{name}` ({element if kind == 'tensor_type' else kind.removesuffix('_type')})")
    return f"input{'s' if len(told) > 1 else ''} {', '.join(told)}"


def _all_nodes_if_few(log: BuilderLog) -> str:
    return _format_nodes(log.op_types) if len(log.op_types) <= _MAX_NODES else ""


def _format_consumers(onnx_path: str, inputs: Sequence[str]) -> str:
    """Tell the nodes that read `inputs`: the library names none, so the graph itself is asked, without its weights."""
    import onnx

    nodes = onnx.load(onnx_path, load_external_data=False).graph.node
    reading = {node.name or f"node_of_{node.output[0]}": node.op_type for node in nodes if set(inputs) & set(node.input)}
    return _format_nodes(reading) or ", which no node reads"


def _format_nodes(op_types: Mapping[str, str]) -> str:
    told = ", ".join(f"`{name}` [{op}]" for name, op in list(op_types.items())[:_MAX_NODES])
    more = f" and {len(op_types) - _MAX_NODES} more" if len(op_types) > _MAX_NODES else ""
    return f", at node{'s' if len(op_types) > 1 else ''} {told}{more}" if op_types else ""
