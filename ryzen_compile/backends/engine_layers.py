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

from ryzen_compile.backends.api import AttentionFusion, EngineLayers
from ryzen_compile.utils.record import Record

LAYERS_HEADING = "Layers:\n"
"""How the message of the builder's log that lists the layers begins."""

_ARITHMETIC_TYPES = {
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

_LAYER_LINE = re.compile(
    r"Name: (?P<name>.*), LayerType: (?P<kind>\w*), Inputs: \[(?P<inputs>.*)\], Constants: \[.*\], "
    r"Outputs: \[(?P<outputs>.*)\], TacticName: (?P<tactic>.*), StreamId: .*?, Metadata: (?P<metadata>.*)"
)
_DATATYPE = re.compile(r"Datatype: (\w+)")
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]\x1f]*)\]")
_FUSED_ATTENTION_KERNEL = re.compile(r"_ge(?:mm|mv)_mha\w*?(?=_myl|_0x|$)")


class LayerInfo(Record, frozen=True):
    """One layer, as far as the report needs it."""

    name: str
    layer_type: str
    tactic: str
    input_types: tuple[str, ...]
    """The builder's names of the element types it reads, in order."""
    output_types: tuple[str, ...]
    nodes: tuple[str, ...]
    """The nodes of the graph that it stands for."""

    @property
    def dtype(self) -> str | None:
        """The type that it computes in: that of the first number it writes, else that it reads; None for none."""
        return next(
            (_ARITHMETIC_TYPES[word] for word in (*self.output_types, *self.input_types) if word in _ARITHMETIC_TYPES), None
        )

    @property
    def fused_attention(self) -> str | None:
        """The name of the attention kernel that it is, or None."""
        found = _FUSED_ATTENTION_KERNEL.match(self.tactic) or _FUSED_ATTENTION_KERNEL.match(self.name)
        return found[0] if found else None


def from_log(message: str, attentions: Sequence[str]) -> EngineLayers:
    """Read the list of layers in the builder's log; `attentions` are the graph's Attention nodes, by name."""
    return _summarize(_parse_log(message), attentions, "builder log")


def from_inspector(text: str, attentions: Sequence[str]) -> EngineLayers:
    """Read what an engine's inspector says, as JSON."""
    return _summarize(_parse_inspector_json(text), attentions, "engine inspector")


def _parse_log(message: str) -> Iterator[LayerInfo]:
    for line in message.removeprefix(LAYERS_HEADING).split("\n"):
        if not line:
            return
        if found := _LAYER_LINE.fullmatch(line):
            yield LayerInfo(
                name=found["name"],
                layer_type=found["kind"],
                tactic=found["tactic"],
                input_types=tuple(_DATATYPE.findall(found["inputs"])),
                output_types=tuple(_DATATYPE.findall(found["outputs"])),
                nodes=tuple(_ONNX_NODE.findall(found["metadata"])),
            )


def _parse_inspector_json(text: str) -> Iterator[LayerInfo]:
    for layer in json.loads(text)["Layers"]:
        if isinstance(layer, str):
            yield LayerInfo(name=layer, layer_type="", tactic="", input_types=(), output_types=(), nodes=())
        else:
            yield LayerInfo(
                name=layer.get("Name", ""),
                layer_type=layer.get("LayerType", ""),
                tactic=layer.get("TacticName", ""),
                input_types=_datatypes(layer.get("Inputs", [])),
                output_types=_datatypes(layer.get("Outputs", [])),
                nodes=tuple(_ONNX_NODE.findall(layer.get("Metadata", ""))),
            )


def _datatypes(tensors: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    words = (str(tensor.get("Datatype") or tensor.get("Format/Datatype", "")).split() for tensor in tensors)
    return tuple(next((word for word in of_one if word in _ARITHMETIC_TYPES), "") for of_one in words)


def _summarize(
    layers: Iterable[LayerInfo], attentions: Sequence[str], source: Literal["engine inspector", "builder log"]
) -> EngineLayers:
    found = list(layers)
    fused = [
        AttentionFusion(kernel=layer.fused_attention, fused=True, nodes=layer.nodes) for layer in found if layer.fused_attention
    ]
    inside = {node for fusion in fused for node in fusion.nodes}
    apart = [
        AttentionFusion(kernel=_layer_types(found, node), fused=False, nodes=(node,))
        for node in attentions
        if node not in inside
    ]
    by_type = Counter(layer.dtype for layer in found if layer.dtype)
    return EngineLayers(
        source=source,
        total=len(found),
        by_type=dict(sorted(by_type.items())),
        attentions=(*fused, *apart),
        limitation=_limitation(source),
    )


def _layer_types(layers: Sequence[LayerInfo], node: str) -> str:
    """Return the kinds of the layers that `node` became: `gemm + kgen`."""
    return " + ".join(dict.fromkeys(layer.layer_type for layer in layers if node in layer.nodes))


def _limitation(source: str) -> str:
    if source == "builder log":
        return "the builder logs one list of layers however many targets, and no casts inside a layer"
    return "casts inside a layer are not listed"
