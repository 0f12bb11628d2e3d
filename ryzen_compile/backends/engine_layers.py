"""What is inside an engine: which share of its layers computes in which type, and which attentions were fused.

The builder's log ends with one list of layers, when it is asked for details; the inspector of a loaded engine gives the
same as JSON. Both are read into the same few facts of a layer.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from ryzen_compile.backends.api import Fusion, Layers
from ryzen_compile.utils.record import Record

HEADING = "Layers:\n"
"""How the message of the builder's log that lists the layers begins."""

_TYPES = {
    "Half": "float16",
    "FP16": "float16",
    "Float": "float32",
    "FP32": "float32",
    "BFloat16": "bfloat16",
    "BF16": "bfloat16",
    "FP8": "float8_e4m3fn",
    "FP4": "float4_e2m1fn",
    "Int8": "int8",
    "INT8": "int8",
}
"""The types that arithmetic is done in, by the builder's names. Layers that only handle indices and shapes have none."""

_LINE = re.compile(
    r"Name: (?P<name>.*), LayerType: (?P<kind>\w*), Inputs: \[(?P<inputs>.*)\], Constants: \[.*\], "
    r"Outputs: \[(?P<outputs>.*)\], TacticName: (?P<tactic>.*), StreamId: .*?, Metadata: (?P<metadata>.*)"
)
_DATATYPE = re.compile(r"Datatype: (\w+)")
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]\x1f]*)\]")
_FUSED = re.compile(r"_ge(?:mm|mv)_mha\w*?(?=_myl|_0x|$)")


class Layer(Record, frozen=True):
    """One layer, as far as the report needs it."""

    name: str
    kind: str
    tactic: str
    inputs: tuple[str, ...]
    """The builder's names of the element types it reads, in order."""
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]
    """The nodes of the graph that it stands for."""

    @property
    def dtype(self) -> str | None:
        """The type that it computes in: that of the first number it writes, else that it reads; None for none."""
        return next((_TYPES[word] for word in (*self.outputs, *self.inputs) if word in _TYPES), None)

    @property
    def fused_attention(self) -> str | None:
        """The name of the attention kernel that it is, or None."""
        found = _FUSED.match(self.tactic) or _FUSED.match(self.name)
        return found[0] if found else None


def from_log(message: str, attentions: Sequence[str]) -> Layers:
    """Read the list of layers in the builder's log; `attentions` are the graph's Attention nodes, by name."""
    return _report(_in_log(message), attentions, "builder log")


def from_inspector(text: str, attentions: Sequence[str]) -> Layers:
    """Read what an engine's inspector says, as JSON."""
    return _report(_in_inspection(text), attentions, "engine inspector")


def _in_log(message: str) -> Iterator[Layer]:
    for line in message.removeprefix(HEADING).split("\n"):
        if not line:
            return
        if found := _LINE.fullmatch(line):
            yield Layer(
                name=found["name"],
                kind=found["kind"],
                tactic=found["tactic"],
                inputs=tuple(_DATATYPE.findall(found["inputs"])),
                outputs=tuple(_DATATYPE.findall(found["outputs"])),
                nodes=tuple(_ONNX_NODE.findall(found["metadata"])),
            )


def _in_inspection(text: str) -> Iterator[Layer]:
    for layer in json.loads(text)["Layers"]:
        if isinstance(layer, str):
            yield Layer(name=layer, kind="", tactic="", inputs=(), outputs=(), nodes=())
        else:
            yield Layer(
                name=layer.get("Name", ""),
                kind=layer.get("LayerType", ""),
                tactic=layer.get("TacticName", ""),
                inputs=_types(layer.get("Inputs", [])),
                outputs=_types(layer.get("Outputs", [])),
                nodes=tuple(_ONNX_NODE.findall(layer.get("Metadata", ""))),
            )


def _types(tensors: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    words = (str(tensor.get("Datatype") or tensor.get("Format/Datatype", "")).split() for tensor in tensors)
    return tuple(next((word for word in of_one if word in _TYPES), "") for of_one in words)


def _report(layers: Iterable[Layer], attentions: Sequence[str], source: Literal["engine inspector", "builder log"]) -> Layers:
    found = list(layers)
    fused = [Fusion(kernel=layer.fused_attention, fused=True, nodes=layer.nodes) for layer in found if layer.fused_attention]
    inside = {node for fusion in fused for node in fusion.nodes}
    apart = [Fusion(kernel=_kinds(found, node), fused=False, nodes=(node,)) for node in attentions if node not in inside]
    by_type = Counter(layer.dtype for layer in found if layer.dtype)
    return Layers(
        source=source,
        total=len(found),
        by_type=dict(sorted(by_type.items())),
        attentions=(*fused, *apart),
        says=_caveat(source),
    )


def _kinds(layers: Sequence[Layer], node: str) -> str:
    """Return the kinds of the layers that `node` became: `gemm + kgen`."""
    return " + ".join(dict.fromkeys(layer.kind for layer in layers if node in layer.nodes))


def _caveat(source: str) -> str:
    if source == "builder log":
        return "the builder logs one list of layers however many targets, and no casts inside a layer"
    return "casts inside a layer are not listed"
