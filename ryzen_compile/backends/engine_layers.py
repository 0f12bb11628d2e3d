"""Layers of an engine: their number per element type, and which attentions are fused.

With detailed profiling verbosity the builder log ends with a list of layers; the inspector of a loaded engine returns the same
information as JSON. Both are parsed into the same records.
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
"""The first line of the builder log message that lists the layers."""

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
"""The builder's names of element types that arithmetic is done in -> numpy names. Layers on indices and shapes have none."""

_LAYER_LINE = re.compile(
    r"Name: (?P<name>.*), LayerType: (?P<layer_type>\w*), Inputs: \[(?P<inputs>.*)\], Constants: \[.*\], "
    r"Outputs: \[(?P<outputs>.*)\], TacticName: (?P<tactic>.*), StreamId: .*?, Metadata: (?P<metadata>.*)"
)
_DATATYPE = re.compile(r"Datatype: (\w+)")
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]\x1f]*)\]")
_FUSED_ATTENTION_KERNEL = re.compile(r"_ge(?:mm|mv)_mha\w*?(?=_myl|_0x|$)")


class LayerInfo(Record, frozen=True):
    """One layer, with the fields that `EngineLayers` is computed from."""

    name: str
    layer_type: str
    tactic: str
    input_types: tuple[str, ...]
    """The builder's names of the element types of the inputs, in order."""
    output_types: tuple[str, ...]
    """The same for the outputs."""
    nodes: tuple[str, ...]
    """The graph nodes that the layer implements."""

    @property
    def dtype(self) -> str | None:
        """The type that the layer computes in: the first arithmetic type of its outputs, else of its inputs, else None."""
        return next(
            (_ARITHMETIC_TYPES[name] for name in (*self.output_types, *self.input_types) if name in _ARITHMETIC_TYPES), None
        )

    @property
    def fused_attention(self) -> str | None:
        """The name of the fused attention kernel of the layer, or None if it is not one."""
        match = _FUSED_ATTENTION_KERNEL.match(self.tactic) or _FUSED_ATTENTION_KERNEL.match(self.name)
        return match[0] if match else None


def from_log(message: str, attentions: Sequence[str]) -> EngineLayers:
    """Return the report of a builder log; `attentions` holds the names of the Attention nodes of the graph."""
    return _summarize(_parse_log(message), attentions, "builder log")


def from_inspector(text: str, attentions: Sequence[str]) -> EngineLayers:
    """Return the report of an engine inspector's JSON; `attentions` holds the names of the Attention nodes of the graph."""
    return _summarize(_parse_inspector_json(text), attentions, "engine inspector")


def _parse_log(message: str) -> Iterator[LayerInfo]:
    for line in message.removeprefix(LAYERS_HEADING).split("\n"):
        if not line:
            return
        if match := _LAYER_LINE.fullmatch(line):
            yield LayerInfo(
                name=match["name"],
                layer_type=match["layer_type"],
                tactic=match["tactic"],
                input_types=tuple(_DATATYPE.findall(match["inputs"])),
                output_types=tuple(_DATATYPE.findall(match["outputs"])),
                nodes=tuple(_ONNX_NODE.findall(match["metadata"])),
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
    descriptions = (str(tensor.get("Datatype") or tensor.get("Format/Datatype", "")) for tensor in tensors)
    return tuple(next((word for word in text.split() if word in _ARITHMETIC_TYPES), "") for text in descriptions)


def _summarize(
    parsed_layers: Iterable[LayerInfo], attentions: Sequence[str], source: Literal["engine inspector", "builder log"]
) -> EngineLayers:
    layers = list(parsed_layers)
    fused = [
        AttentionFusion(kernel=layer.fused_attention, fused=True, nodes=layer.nodes)
        for layer in layers
        if layer.fused_attention
    ]
    fused_nodes = {node for fusion in fused for node in fusion.nodes}
    unfused = [
        AttentionFusion(kernel=_layer_types(layers, node), fused=False, nodes=(node,))
        for node in attentions
        if node not in fused_nodes
    ]
    by_type = Counter(layer.dtype for layer in layers if layer.dtype)
    return EngineLayers(
        source=source,
        total=len(layers),
        by_type=dict(sorted(by_type.items())),
        attentions=(*fused, *unfused),
        limitation=_limitation(source),
    )


def _layer_types(layers: Sequence[LayerInfo], node: str) -> str:
    """Return the types of the layers that implement `node`: `gemm + kgen`."""
    return " + ".join(dict.fromkeys(layer.layer_type for layer in layers if node in layer.nodes))


def _limitation(source: str) -> str:
    if source == "builder log":
        return "the builder logs one list of layers for all targets together, and does not list casts inside a layer"
    return "casts inside a layer are not listed"
