"""The pass `token-merge`: encoders of every export style against a PyTorch implementation, padding, and refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from support import decoders, encoders
from support.ort_session import run_as_written

import ryzen_compile as rc
from ryzen_compile.ir.load import load
from ryzen_compile.spec.fidelity import Lossy
from ryzen_compile.spec.passes import Change, PassContext, Refusal
from ryzen_passes.attention import Attention
from ryzen_passes.fold import Fold
from ryzen_passes.token_merge import TokenMerge
from ryzen_passes.token_merge.token_axes import find_token_axes

CONTEXT = PassContext(backend="onnxruntime")
STYLES = ["tracer-17-sdpa", *(pytest.param(style, marks=pytest.mark.exhaustive) for style in encoders.STYLES)]
Array = np.ndarray[Any, Any]


def load_folded(path: Path) -> ir.Model:
    model = load(path)
    Fold().rewrite(model, CONTEXT)
    return model


def merged(path: Path, token_merge: TokenMerge) -> ir.Model:
    model = load_folded(path)
    outcome = token_merge.rewrite(model, CONTEXT)
    assert isinstance(outcome, Change), outcome
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def arrays(name: str, **sizes: int) -> dict[str, Array]:
    return {key: tensor.numpy() for key, tensor in encoders.inputs(name, **sizes).items()}


def real_rows(inputs: dict[str, Array], hidden: Array) -> Array:
    """Return the rows of `hidden` (batch, tokens, features) that are no padding."""
    mask = inputs.get("attention_mask")
    return hidden.reshape(-1, hidden.shape[-1]) if mask is None else hidden[mask > 0]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", list(encoders.ENCODERS))
def test_an_encoder_in_which_no_token_is_merged_is_unchanged(name: str, style: str) -> None:
    """The share is less than a token, so that the steps, the masks and the reshapes are there and nothing is merged."""
    model, inputs = merged(encoders.export(name, style), TokenMerge(ratio=1e-3)), arrays(name)
    assert [node.op_type for node in model.graph].count("TokenMerge") == encoders.LAYERS - 1
    expected = run_as_written(ir.to_proto(load_folded(encoders.export(name, style))), inputs)[0]
    actual = run_as_written(ir.to_proto(model), inputs)[0]
    assert actual.shape == expected.shape
    np.testing.assert_allclose(real_rows(inputs, actual), real_rows(inputs, expected), atol=2e-6)


@torch.no_grad()  # type: ignore[untyped-decorator]
def merging_bert(inputs: dict[str, torch.Tensor], shares: tuple[float, ...], protect: int) -> Array:
    """Return the hidden states of the tiny BERT with token merging, written with its PyTorch layers and loops over tokens."""
    bert: Any = encoders.module("bert", "sdpa").inner
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    x, size = bert.embeddings(input_ids=ids), mask.double()
    batch, count, width = x.shape
    slot = torch.arange(count).expand(batch, count)
    for layer, share in zip(bert.encoder.layer, shares, strict=True):
        attention = layer.attention.self
        heads = attention.num_attention_heads

        def split(t: torch.Tensor, heads: int = heads) -> torch.Tensor:
            return t.unflatten(-1, (heads, -1)).transpose(1, 2)

        query, key, value = (split(linear(x)) for linear in (attention.query, attention.key, attention.value))
        scores = query @ key.transpose(2, 3) / math.sqrt(width // heads) + size.log().float()[:, None, None, :]
        x = layer.attention.output((scores.softmax(-1) @ value).transpose(1, 2).flatten(2), x)
        rows, sizes, slots = zip(*(merge(x[b], size[b], int(share * count + 0.5), protect) for b in range(batch)), strict=True)
        x, size, slot = torch.stack(rows), torch.stack(sizes), torch.stack(slots).gather(1, slot)
        x = layer.output(layer.intermediate(x), x)
    result: Array = x.gather(1, slot[..., None].expand(-1, -1, width)).detach().numpy()
    return result


def merge(x: torch.Tensor, size: torch.Tensor, count: int, protect: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge `count` tokens of one sequence: return the rows and sizes that are left, and the slot of each token."""
    unit = torch.nn.functional.normalize(x, dim=1)
    second, first = range(protect, len(x), 2), range(protect + 1, len(x), 2)
    pairs = []
    for token in first:
        alike = [
            (float(unit[token] @ unit[other]) if size[other] else -2.0) if size[token] else (2.0 if size[other] else 3.0)
            for other in second
        ]
        pairs.append((max(alike), -token, second[alike.index(max(alike))]))
    partner = {-token: other for _, token, other in sorted(pairs, reverse=True)[:count]}
    groups = {token: [token] for token in range(len(x)) if token not in partner}
    for token, other in partner.items():
        groups[other].append(token)
    real = [[token for token in group if size[token]] for group in groups.values()]
    rows = [(x[group] * size[group, None]).sum(0) / size[group].sum() if group else torch.zeros(x.shape[1]) for group in real]
    slots = {token: index for index, group in enumerate(groups.values()) for token in group}
    return (
        torch.stack([row.float() for row in rows]),
        torch.stack([size[group].sum() for group in groups.values()]),
        torch.tensor([slots[token] for token in range(len(x))]),
    )


@pytest.mark.parametrize("protect", [0, 1, 3])
@pytest.mark.parametrize("schedule", ["increasing", "uniform", "decreasing"])
@pytest.mark.parametrize("style", STYLES)
def test_a_merging_encoder_computes_what_the_module_computes(style: str, schedule: Any, protect: int) -> None:
    token_merge = TokenMerge(ratio=0.5, schedule=schedule, protect=protect)
    shares = {"increasing": (0, 1, 2, 3), "uniform": (1.5,) * 4, "decreasing": (3, 2, 1, 0)}[schedule]
    inputs = encoders.inputs("bert", batch=3, tokens=24)
    expected = merging_bert(inputs, tuple(share / 12 for share in shares), protect)
    model = merged(encoders.export("bert", style), token_merge)
    actual = run_as_written(ir.to_proto(model), {name: tensor.numpy() for name, tensor in inputs.items()})[0]
    mask = inputs["attention_mask"].numpy() > 0
    np.testing.assert_allclose(actual[mask], expected[mask], atol=1e-5)
    assert len(np.unique(actual[1].round(4), axis=0)) == 12


def test_padding_is_merged_before_tokens_and_changes_none() -> None:
    """A row whose padding suffices for all steps is unchanged, whatever the tokens of the padding are."""
    inputs = arrays("bert", batch=2, tokens=40)
    inputs["attention_mask"][:, 8:] = 0
    source, model = (
        load_folded(encoders.export("bert", "tracer-17-sdpa")),
        merged(encoders.export("bert", "tracer-17-sdpa"), TokenMerge(ratio=0.3)),
    )
    expected = run_as_written(ir.to_proto(source), inputs)[0]
    other = {**inputs, "input_ids": np.where(inputs["attention_mask"] > 0, inputs["input_ids"], 7)}
    for each in (inputs, other):
        actual = run_as_written(ir.to_proto(model), each)[0]
        np.testing.assert_allclose(actual[:, :8], expected[:, :8], atol=2e-6)


@pytest.mark.parametrize("style", ["tracer-17-sdpa", pytest.param("dynamo-23", marks=pytest.mark.exhaustive)])
def test_every_length_runs(style: str) -> None:
    proto = ir.to_proto(merged(encoders.export("bert", style), TokenMerge(ratio=0.9, schedule="uniform")))
    for tokens in (1, 2, 3, 4, 5, 17, 64):
        inputs = arrays("bert", batch=1, tokens=max(tokens, 3))
        inputs = {name: array[:, :tokens] for name, array in inputs.items()}
        inputs["attention_mask"][:] = 1
        hidden = run_as_written(proto, inputs)[0]
        assert hidden.shape == (1, tokens, 32)
        assert np.isfinite(hidden).all()
        assert len(np.unique(hidden[0].round(5), axis=0)) <= max(1, math.ceil(tokens * 0.9))


@pytest.mark.parametrize("name", ["bert", pytest.param("whisper", marks=pytest.mark.exhaustive)])
def test_it_builds_for_a_gpu(name: str, tmp_path: Path) -> None:
    passes = "fold,token-merge{floor=-1},attention"
    package = rc.build(str(encoders.export(name, "dynamo-23")), str(tmp_path / "p"), gpu="cpu,sm89", passes=passes, cache=False)
    assert [str(target) for engine in package.manifest.engines for target in engine.targets] == ["sm89"]
    variant = package.manifest.variant_of(package.manifest.engines[0])
    assert [record.outcome for record in variant.passes if record.pass_spec.startswith("token-merge")] == ["changed"]


@pytest.mark.exhaustive
def test_attention_on_merged_tokens_is_fused(tmp_path: Path) -> None:
    """The sizes of tokens are an additive mask, which the fused kernel of TensorRT-RTX takes."""
    rc.export("recipe:minilm", tmp_path / "minilm.onnx")
    passes = "fold,precision{to=fp16},token-merge,attention"
    package = rc.build(
        str(tmp_path / "minilm.onnx"), str(tmp_path / "p"), gpu="sm89", passes=passes, compare=False, cache=False
    )
    (engine,) = package.manifest.engines
    assert engine.layers is not None
    assert [fusion.fused for fusion in engine.layers.attentions] == [True] * 6


def refusal(model: ir.Model) -> Refusal:
    before = ir.to_proto(model).SerializeToString()
    outcome = TokenMerge().rewrite(model, CONTEXT)
    assert isinstance(outcome, Refusal)
    assert ir.to_proto(model).SerializeToString() == before
    return outcome


def test_a_decoder_is_refused() -> None:
    assert "decoder with caches" in refusal(load_folded(decoders.export("llama", "optimum-sdpa"))).reason
    without_caches = refusal(load_folded(decoders.export("llama", "prefill-21")))
    assert "hides other tokens" in without_caches.reason


def test_fused_attention_is_refused() -> None:
    model = load_folded(encoders.export("vit", "tracer-17-sdpa"))
    assert isinstance(Attention(to="tensorrt").rewrite(model, PassContext(backend="tensorrt-rtx")), Change)
    outcome = refusal(model)
    assert "TRT_Attention" in outcome.reason
    assert outcome.hint == "run token-merge before the pass that fuses attention"


@pytest.mark.parametrize("place", ["middle", "output"])
def test_hidden_states_of_inner_blocks_as_outputs_are_refused(place: str) -> None:
    model = load_folded(encoders.export("vit", "tracer-17-sdpa"))
    from ryzen_passes.residual_stream import find_blocks

    inner = getattr(find_blocks(model)[1], place)
    inner.type, inner.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", 17, 32])
    model.graph.outputs.append(inner)
    assert "also used outside" in refusal(model).reason


def test_a_bias_on_the_scores_is_refused() -> None:
    """T5 adds a learned bias of the distance between tokens."""
    model = load_folded(encoders.export("vit", "tracer-17-sdpa"))
    for node in list(model.graph):
        if node.op_type == "Softmax":
            bias = ir.Value(
                name=f"bias_of_{node.name}", const_value=ir.tensor(np.linspace(0, 1, 289, dtype=np.float32).reshape(17, 17))
            )
            model.graph.register_initializer(bias)
            add = ir.node("Add", [node.inputs[0], bias], name=f"add_{node.name}")
            add.outputs[0].name, add.outputs[0].type = f"biased_{node.name}", ir.TensorType(ir.DataType.FLOAT)
            model.graph.insert_before(node, add)
            node.replace_input_with(0, add.outputs[0])
    assert "a bias is added to the scores" in refusal(model).reason


def test_a_graph_without_blocks_is_refused() -> None:
    x = ir.Value(name="x", shape=ir.Shape([2, 3]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Relu", [x])
    node.outputs[0].name = "y"
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 18}, name="g")
    assert refusal(ir.Model(graph, ir_version=10)).reason == "no blocks of a transformer are found"


def test_nodes_that_may_move_tokens_are_refused() -> None:
    from ryzen_compile.ir.analysis.sizes import ShapeInference
    from ryzen_compile.ir.patterns import PatternNotMatched

    x = ir.Value(name="x", shape=ir.Shape([2, 3, 4]), type=ir.TensorType(ir.DataType.FLOAT))
    for op_type, attributes in (("CumSum", {}), ("Softplus", {}), ("Split", {"axis": 1}), ("ReduceMean", {"axes": [1]})):
        node = ir.node(op_type, [x], attributes)
        if op_type == "Softplus":
            assert find_token_axes(x, [node], ShapeInference())[node.outputs[0]] == {1}
            continue
        with pytest.raises(PatternNotMatched):
            find_token_axes(x, [node], ShapeInference())


@pytest.mark.parametrize(
    "options", [{"ratio": 0}, {"ratio": 1}, {"ratio": float("nan")}, {"protect": -1}, {"floor": 2}], ids=str
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|floor"):
        TokenMerge(**options)


def test_the_floor_is_declared() -> None:
    assert TokenMerge(floor=0.9).fidelity == Lossy("cosine", 0.9)
    estimate = TokenMerge(ratio=0.6).estimate(load_folded(encoders.export("vit", "tracer-17-sdpa")), CONTEXT)
    assert not isinstance(estimate, Refusal)
    assert estimate.reason == "75% of the tokens in the MLPs of 4 blocks"
