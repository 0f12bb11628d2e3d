"""The pass `attention` on exported small Transformers models: outputs on ONNX Runtime before and after it are equal."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.ort_session import run_as_written

from ryzen_compile.pipeline.pass_manager import run_passes
from ryzen_compile.registry import find_pass, properties
from ryzen_compile.spec.passes import PassContext
from ryzen_passes.attention import Attention

pytestmark = pytest.mark.slow
LAYERS, B, S, PAST = 2, 2, 5, 4
SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": LAYERS, "intermediate_size": 96}


def wrap(model: Any, forward: Callable[..., Any]) -> Any:
    """Return a module around `model` with the function `forward`, whose first argument is `model`."""
    import torch

    class WrappedModel(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: torch.Tensor) -> Any:
            return forward(self.model, *inputs)

    return WrappedModel()


def vit(implementation: str) -> tuple[Any, tuple[Any, ...], Any, list[str]]:
    import torch
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=8), add_pooling_layer=False)
    model.set_attn_implementation(implementation)

    module = wrap(model, lambda model, pixels: model(pixels).last_hidden_state)
    return module, (torch.randn(B, 3, 32, 32),), {"pixels": {0: "batch"}}, ["pixels"]


def bert(implementation: str) -> tuple[Any, tuple[Any, ...], Any, list[str]]:
    import torch
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(**SMALL, vocab_size=100), add_pooling_layer=False)
    model.set_attn_implementation(implementation)

    module = wrap(model, lambda model, ids, mask: model(input_ids=ids, attention_mask=mask).last_hidden_state)
    mask = torch.ones(B, S, dtype=torch.int64)
    mask[1, 3:] = 0
    dynamic = {name: {0: "batch", 1: "seq"} for name in ("ids", "mask")}
    return module, (torch.randint(0, 99, (B, S)), mask), dynamic, ["ids", "mask"]


def llama(implementation: str) -> tuple[Any, tuple[Any, ...], Any, list[str]]:
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=100, max_position_embeddings=64))
    model.set_attn_implementation(implementation)

    def forward(model: Any, ids: Any, mask: Any, positions: Any, k0: Any, v0: Any, k1: Any, v1: Any) -> Any:
        cache = DynamicCache()
        cache.update(k0, v0, 0)
        cache.update(k1, v1, 1)
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        cache_tensors = [tensor for layer in out.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (out.logits, *cache_tensors)

    mask = torch.ones(B, S + PAST, dtype=torch.int64)
    mask[1, :2] = 0
    positions = torch.arange(PAST, PAST + S)[None].repeat(B, 1)
    past = [torch.randn(B, 2, PAST, 16) for _ in range(2 * LAYERS)]
    names = ["ids", "mask", "positions", "k0", "v0", "k1", "v1"]
    dynamic = {name: {0: "batch", 2: "past"} if name[0] in "kv" else {0: "batch", 1: "seq"} for name in names}
    dynamic["mask"] = {0: "batch", 1: "total"}
    return wrap(model, forward), (torch.randint(0, 99, (B, S)), mask, positions, *past), dynamic, names


def export(make_model: Any, implementation: str, opset: int, path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Export a model at `opset`, below 18 with the TorchScript exporter; return the sample inputs."""
    import torch

    torch.manual_seed(0)
    module, sample, dynamic, names = make_model(implementation)
    module.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if opset < 18:
            torch.onnx.export(module, sample, path, dynamo=False, opset_version=opset, dynamic_axes=dynamic, input_names=names)
        else:
            auto = torch.export.Dim.DYNAMIC
            shapes = (tuple(dict.fromkeys(dynamic[name], auto) for name in names),)
            program = torch.onnx.export(
                module, sample, dynamo=True, opset_version=opset, dynamic_shapes=shapes, input_names=names, verbose=False
            )
            assert program is not None
            program.save(path)
    return {name: tensor.numpy() for name, tensor in zip(names, sample, strict=True)}


EXPORTS = [(17, "sdpa"), (18, "eager"), (21, "sdpa"), (23, "sdpa")]
SAMPLED = {(llama, *exported) for exported in EXPORTS} | {(vit, 23, "sdpa"), (bert, 18, "eager")}
"""The exports that `make test` checks."""


@pytest.mark.parametrize(
    ("make_model", "opset", "implementation"),
    [
        pytest.param(*case, marks=() if case in SAMPLED else pytest.mark.exhaustive)
        for case in ((make_model, *exported) for make_model in (vit, bert, llama) for exported in EXPORTS)
    ],
)
def test_every_attention_of_an_exported_model_is_fused(
    make_model: Any, implementation: str, opset: int, tmp_path: Path
) -> None:
    feed = export(make_model, implementation, opset, tmp_path / "before.onnx")
    expected = run_as_written(tmp_path / "before.onnx", feed)
    for passes in ([Attention()], [find_pass("fold")(), Attention()]):
        model = ir.load(tmp_path / "before.onnx")
        records = run_passes(model, passes, PassContext(backend="tensorrt-rtx"), properties())
        ir.save(model, tmp_path / "after.onnx")
        onnx.checker.check_model(tmp_path / "after.onnx", full_check=True)
        assert sum(node.op_type == "TRT_Attention" for node in model.graph) == LAYERS
        assert not any(node.op_type in ("Softmax", "Attention") for node in model.graph)
        assert not records[-1].notes
        if make_model is llama:
            keys = [node.inputs[1] for node in model.graph if node.op_type == "TRT_Attention"]
            assert all(key is not None and key.producer().op_type == "Concat" for key in keys)  # type: ignore[union-attr]
        for actual, expected_output in zip(run_as_written(tmp_path / "after.onnx", feed), expected, strict=True):
            np.testing.assert_allclose(actual, expected_output, rtol=0, atol=1e-5)
