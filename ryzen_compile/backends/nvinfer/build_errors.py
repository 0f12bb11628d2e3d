"""Why an engine was not built, in the graph's own words: the node, its op, the reason without the library's source lines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ryzen_compile.backends.nvinfer.builder_log import Log
from ryzen_compile.backends.process.crash_breadcrumb import Chatter
from ryzen_compile.errors import BackendError

_FEW = 3
"""Up to how many nodes a graph is told by all of them where the library names none."""
_ASIDE = re.compile(r"^Invalid Node - |checkMacros\.cpp|^Internal Error: MyelinCheckException")
_PLACE = re.compile(r"\s+In [\w:]+(?:\(\))? at /[^\s)]+:\d+")
_HEAD = re.compile(r"^(?:\[[^\]]*\] )?(?:\w+::\w+: )?Error Code \d+: [\w ]+\((.*?)\)?$")
_MYELIN = re.compile(r"^\[[^\]]*\] (?:\w+: )?(?:\S+\.cpp:\d+: )?(?:CHECK\(.*?\) failed\. )?")
_CONDITION = re.compile(r"^(?:Parameter check failed, condition: |Assertion (?:failed: )?)?.*[=!<>(|&].*?(?:\.|:) (?=[A-Z])")
_QUOTED = re.compile(r'&& "(.*)"$')
_OWN_NAME = re.compile(r"^node_of_\S+: ")


def not_parsed(product: str, graph: str, parser: Any, log: Log, chatter: Chatter) -> BackendError:
    """Return why the graph could not be imported."""
    errors = [parser.get_error(at) for at in range(parser.num_errors)]
    if not errors:
        return BackendError(f"{product} cannot read the graph: {_reason(log, chatter)}")
    inputs = [error.file() for error in errors if error.func() == "importInput"]
    if inputs:
        return BackendError(
            f"{product} does not know the type of {_typed(graph, inputs)}{_readers(graph, inputs)}",
            hint="cast it to float32, float16, bfloat16, int64, int32 or bool in front of the graph",
        )
    error = errors[0]
    name, op = log.last
    if not op:
        also = f" ({chatter.tail()})" if chatter.tail() else ""
        return BackendError(f"{product} cannot read the graph: {plain(error.desc())}{also}")
    if error.node_operator() and error.node_operator() != op:
        name, op = f"#{error.node()}", error.node_operator()
    reason = plain(error.desc())
    if reason == "false" or reason.startswith("Plugin not found") or "plugin" in reason.lower():
        return BackendError(f"{product} does not know node `{error.node_name() or name}` [{op}]")
    return BackendError(f"{product} refuses node `{error.node_name() or name}` [{op}]: {reason}")


def not_built(product: str, log: Log, chatter: Chatter) -> BackendError:
    """Return why the imported graph could not be built."""
    reason = _reason(log, chatter)
    words = set(re.findall(r"\w+", reason))
    named = [name for name in log.ops if name in reason]
    meant = named or [name for name, op in log.ops.items() if op in words]
    where = _at({name: log.ops[name] for name in meant}) or _told_by_all(log)
    hint = None
    if "Attention" in words:
        hint = "run the pass `attention`, not strict: where there is no fused kernel, an attention is then built of others"
    elif "violate shape constraints" in reason:
        hint = "the shapes do not go together: give --min-shapes, --opt-shapes and --max-shapes that do"
    return BackendError(f"{product} cannot build the graph{where}: {reason}", hint=hint)


def not_configured(product: str, log: Log, chatter: Chatter) -> BackendError:
    """Return what is against the options or the targets."""
    return BackendError(f"{product} refuses the options or the targets: {_reason(log, chatter)}")


def no_values(product: str, graph: str, name: str) -> BackendError:
    """Return that the values of the input `name` would have to be known."""
    return BackendError(
        f"{product} needs to know the values of the input `{name}`, which are sizes{_readers(graph, [name])}, "
        "and a profile only has shapes",
        hint=f"make `{name}` a constant of the graph",
    )


def plain(text: str) -> str:
    """Return what a message of the library says, without where in its sources it says it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    text = next((line for line in lines if not _ASIDE.search(line)), lines[0] if lines else "")
    text = _PLACE.sub("", text)
    if found := _HEAD.match(text):
        text = found[1]
    text = _MYELIN.sub("", text)
    if found := _QUOTED.search(text):
        return found[1]
    text = _OWN_NAME.sub("", text.partition("  (See ")[0])
    return _CONDITION.sub("", text).strip() or text


def _reason(log: Log, chatter: Chatter) -> str:
    said = [plain(message) for message in log.errors]
    return "; ".join(dict.fromkeys(filter(None, said))) or plain(chatter.tail()) or "it gives no reason"


def _typed(graph: str, inputs: Sequence[str]) -> str:
    """Tell inputs with their types: `x` (int16), `items` (sequence)."""
    import onnx

    types = {value.name: value.type for value in onnx.load(graph, load_external_data=False).graph.input}
    told = []
    for name in inputs:
        kind = str(types[name].WhichOneof("value"))
        element = onnx.TensorProto.DataType.Name(types[name].tensor_type.elem_type).lower()
        told.append(f"`{name}` ({element if kind == 'tensor_type' else kind.removesuffix('_type')})")
    return f"input{'s' if len(told) > 1 else ''} {', '.join(told)}"


def _told_by_all(log: Log) -> str:
    return _at(log.ops) if len(log.ops) <= _FEW else ""


def _readers(graph: str, inputs: Sequence[str]) -> str:
    """Tell the nodes that read `inputs`: the library names none, so the graph itself is asked, without its weights."""
    import onnx

    nodes = onnx.load(graph, load_external_data=False).graph.node
    reading = {node.name or f"node_of_{node.output[0]}": node.op_type for node in nodes if set(inputs) & set(node.input)}
    return _at(reading) or ", which no node reads"


def _at(ops: Mapping[str, str]) -> str:
    told = ", ".join(f"`{name}` [{op}]" for name, op in list(ops.items())[:_FEW])
    more = f" and {len(ops) - _FEW} more" if len(ops) > _FEW else ""
    return f", at node{'s' if len(ops) > 1 else ''} {told}{more}" if ops else ""
