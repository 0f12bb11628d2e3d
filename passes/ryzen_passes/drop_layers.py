"""The pass `drop-layers`: remove whole blocks of a transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ryzen_compile.spec.fidelity import Fidelity, Lossy
from ryzen_compile.spec.passes import Change, Pass, PassContext, PassEstimate, Refusal

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from ryzen_compile.spec.interface import Interface
    from ryzen_passes.residual_stream import TransformerBlock


@dataclass(frozen=True, kw_only=True)
class DropLayers(Pass):
    """Remove blocks, each an attention and an MLP: what a block reads takes the place of what it yields.

    Either `layers` lists the blocks, or the `count` with the least influence are removed: that of a block is 1 minus the mean
    cosine similarity of its input and its output over the tokens of the calibration samples (ShortGPT, Men et al. 2024,
    arXiv:2403.03853). The first and the last block are then kept. The inputs and outputs of the caches of a removed block are
    removed too, so that a decoder is rewritten before it is built.

    The graph must be folded. Blocks are found by structure: see `residual_stream`.
    """

    name: ClassVar[str] = "drop-layers"

    layers: tuple[int, ...] = ()
    """The blocks to remove, counted from 0; empty: `count` decides."""
    count: int = 0
    """The number of blocks to remove, those with the least influence."""
    floor: float = 0.8
    """The smallest accepted cosine similarity of an output vector with that of the source."""

    def __post_init__(self) -> None:
        if self.count < 0 or any(layer < 0 for layer in self.layers):
            raise ValueError("`count` and `layers` must be at least 0")
        if len({*self.layers}) < len(self.layers):
            raise ValueError("`layers` lists a block twice")
        if self.layers and self.count:
            raise ValueError("give either `layers` or `count`")
        Lossy("cosine", self.floor)  # raises ValueError for a floor out of range

    @property
    def needs_calibration(self) -> bool:
        """Whether the influence of blocks is measured."""
        return bool(self.count)

    @property
    def fidelity(self) -> Fidelity:
        """Lossy: the cosine similarity of the outputs."""
        return Lossy("cosine", self.floor)

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate | Refusal:
        """Return the change of the weight bytes for `layers`; that of `count` depends on which blocks it removes."""
        from ryzen_passes.residual_stream import find_blocks

        blocks = find_blocks(model)
        if (refusal := self._refusal(model, blocks)) is not None:
            return refusal
        if not self.layers:
            return PassEstimate(reason="the blocks depend on the samples")
        removed = frozenset(node for layer in self.layers for node in blocks[layer].nodes)
        weights = {value for node in removed for value in node.inputs if value is not None and value.is_initializer()}
        unused = [value.const_value for value in weights if all(node in removed for node, _ in value.uses())]
        saved = sum(tensor.nbytes for tensor in unused if tensor is not None)
        return PassEstimate(weight_bytes=-saved, nodes=-len(removed), reason=f"{len(self.layers)} of {len(blocks)} blocks")

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        """Remove the blocks from `model` in place."""
        from ryzen_compile.errors import BackendError
        from ryzen_passes.residual_stream import find_blocks

        blocks = find_blocks(model)
        if (refusal := self._refusal(model, blocks)) is not None:
            return refusal
        layers, notes = self.layers, list[str]()
        if not layers:
            if not context.samples or context.measure_cosines is None or context.samples_origin == "random":
                return Refusal(
                    reason="the influence of blocks is measured on real inputs, and there are no samples",
                    location=model.graph.name or "the graph",
                    hint="give samples with --data, or list the blocks: layers=[4,5]",
                )
            pairs = [(str(block.input.name), str(block.output.name)) for block in blocks]
            try:
                cosines = context.measure_cosines(model, pairs, context.samples)
            except BackendError as error:
                return Refusal(reason=error.message, location=model.graph.name or "the graph", hint=error.hint)
            notes = [f"block {index}: influence {1 - cosine:.3f}" for index, cosine in enumerate(cosines)]
            inner = sorted(range(1, len(blocks) - 1), key=lambda index: -cosines[index])
            layers = tuple(sorted(inner[: self.count]))
        removed = _remove(model, [blocks[layer] for layer in layers])
        return Change(
            removed=tuple(removed),
            summary=f"removed the blocks {', '.join(map(str, layers))} of {len(blocks)}",
            notes=tuple(notes),
        )

    def _refusal(self, model: ir.Model, blocks: list[TransformerBlock]) -> Refusal | None:
        from ryzen_compile.spec.kv_cache import read_kv_cache_spec

        location = model.graph.name or "the graph"
        if not self.layers and not self.count:
            hint = "write drop-layers{count=2} or drop-layers{layers=[4,5]}"
            return Refusal(reason="neither `layers` nor `count` is given", location=location, hint=hint)
        if read_kv_cache_spec(model) is not None:
            reason = "its caches were rewritten by a kv pass, which recorded those of every block"
            return Refusal(reason=reason, location=location, hint="run drop-layers before kv-static")
        if not blocks:
            return Refusal(reason="no blocks of a transformer are found", location=location, hint="fold the graph first")
        if self.layers and (beyond := [layer for layer in self.layers if layer >= len(blocks)]):
            return Refusal(
                reason=f"there is no block {beyond[0]}: the model has {len(blocks)}, counted from 0", location=location
            )
        if len(self.layers) >= len(blocks) or self.count > len(blocks) - 2:
            reason = f"{len(self.layers) or self.count} of {len(blocks)} blocks are too many"
            return Refusal(reason=reason, location=location, hint="with `count`, the first and the last block are kept")
        return None


def _remove(model: ir.Model, blocks: list[TransformerBlock]) -> list[str]:
    """Remove `blocks` and the inputs and outputs that only they have; return the names of the removed nodes."""
    import msgspec
    import onnx_ir as ir

    from ryzen_compile.ir.edit.builder import remove_dead_nodes
    from ryzen_compile.ir.edit.insertion import NameAllocator
    from ryzen_compile.ir.interface_metadata import interface_of, write_interface

    graph = model.graph
    interface, names = interface_of(model), NameAllocator(model)
    nodes = frozenset(node for block in blocks for node in block.nodes)
    used_inputs = {value for value in graph.inputs if value.uses()}
    block_inputs = [value for value in graph.inputs if any(user in nodes for user, _ in value.uses())]
    for block in reversed(blocks):
        source = block.input
        if block.output.is_graph_output():
            name, identity = block.output.name, ir.node("Identity", [block.input], name=names.allocate("removed_block"))
            graph.append(identity)
            block.output.name = names.allocate(f"{name}_removed")
            source = identity.outputs[0]
            source.name, source.shape, source.type = name, block.output.shape, block.output.type
        block.output.replace_all_uses_with(source, replace_graph_outputs=True)
    caches = [value for value in graph.outputs if value.producer() in nodes]
    for value in caches:
        graph.outputs.remove(value)
    removed = remove_dead_nodes([node for node in nodes if node.graph is graph])
    for value in block_inputs:
        _read_length_elsewhere(value, graph.inputs, interface, block_inputs)
    unused = [value for value in graph.inputs if value in used_inputs and not value.uses()]
    for value in unused:
        graph.inputs.remove(value)
    gone = {value.name for value in (*caches, *unused)}
    write_interface(
        model,
        msgspec.structs.replace(
            interface,
            inputs=tuple(spec for spec in interface.inputs if spec.name not in gone),
            outputs=tuple(spec for spec in interface.outputs if spec.name not in gone),
            states=tuple(state for state in interface.states if state.input not in gone and state.output not in gone),
        ),
    )
    return removed


def _read_length_elsewhere(
    value: ir.Value, inputs: Sequence[ir.Value], interface: Interface, removed: Sequence[ir.Value]
) -> None:
    """Let nodes that read only the shape of `value`, a cache of a removed block, read that of an input with the same dims.

    Exporters take the number of cached tokens from the cache of the first block.
    """
    if not value.uses() or any(user.op_type != "Shape" for user, _ in value.uses()):
        return
    dims = {spec.name: spec.dims for spec in interface.inputs}
    for other in inputs:
        if other not in removed and dims.get(str(other.name)) == dims.get(str(value.name)) and other.uses():
            value.replace_all_uses_with(other)
            return
