"""Tiny encoders of Transformers with random weights, exported as users do: see `export`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_export import DYNAMO, TRACER, export_module

from ryzen_compile.utils.source_digest import module_digest
from support.shared_files import shared_file

if TYPE_CHECKING:
    import torch

LAYERS = 4
_SIZES = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 64}


@dataclass(frozen=True)
class Encoder:
    """An encoder: its classes in Transformers, and the options of its configuration."""

    config: str
    model: str
    options: Mapping[str, Any]
    takes: str
    """What it takes: `ids`, with a mask; `pixels`; or `features`."""


ENCODERS = {
    "bert": Encoder("BertConfig", "BertModel", {**_SIZES, "vocab_size": 99, "max_position_embeddings": 64}, "ids"),
    "roberta": Encoder("RobertaConfig", "RobertaModel", {**_SIZES, "vocab_size": 99, "max_position_embeddings": 64}, "ids"),
    "distilbert": Encoder(
        "DistilBertConfig",
        "DistilBertModel",
        {"dim": 32, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 64, "vocab_size": 99, "max_position_embeddings": 64},
        "ids",
    ),
    "vit": Encoder("ViTConfig", "ViTModel", {**_SIZES, "image_size": 32, "patch_size": 8}, "pixels"),
    "clip": Encoder("CLIPVisionConfig", "CLIPVisionModel", {**_SIZES, "image_size": 32, "patch_size": 8}, "pixels"),
    "whisper": Encoder(
        "WhisperConfig",
        "WhisperModel",
        {
            **{"d_model": 32, "encoder_layers": LAYERS, "encoder_attention_heads": 4, "encoder_ffn_dim": 64},
            **{"decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "vocab_size": 99},
            **{"num_mel_bins": 8, "max_source_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        },
        "features",
    ),
}
STYLES = {
    "dynamo-18": (DYNAMO, 18, "sdpa"),
    "dynamo-23": (DYNAMO, 23, "sdpa"),
    "tracer-17-sdpa": (TRACER, 17, "sdpa"),
    "tracer-14-eager": (TRACER, 14, "eager"),
}
"""Exporter, opset and attention implementation by name."""


def inputs(name: str, *, batch: int = 2, tokens: int = 12) -> dict[str, torch.Tensor]:
    """Return example inputs of an encoder."""
    import torch

    torch.manual_seed(0)
    takes = ENCODERS[name].takes
    if takes == "ids":
        mask = torch.ones(batch, tokens, dtype=torch.int64)
        mask[0, tokens - 3 :] = 0
        return {"input_ids": torch.randint(5, 90, (batch, tokens)), "attention_mask": mask}
    if takes == "pixels":
        return {"pixel_values": torch.randn(batch, 3, 32, 32)}
    return {"input_features": torch.randn(batch, 8, 32)}


@functools.cache
def module(name: str, attention: str) -> torch.nn.Module:
    """Return the encoder, whose output is the hidden states after the last block, with deterministic weights."""
    import torch
    import transformers

    encoder = ENCODERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, encoder.config)(**encoder.options, attn_implementation=attention)
    model = getattr(transformers, encoder.model)(config).eval()
    inner = model.get_encoder() if name == "whisper" else model

    class Hidden(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, first: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
            options = {} if attention_mask is None else {"attention_mask": attention_mask}
            hidden: torch.Tensor = self.inner(first, **options).last_hidden_state
            return hidden

    return Hidden().eval()


@functools.cache
def export(name: str, style: str) -> Path:
    """Return the path of the exported graph, created once for all processes; exporter errors are propagated."""
    import torch
    import transformers

    exporter, opset, attention = STYLES[style]
    samples = inputs(name)
    axes = {input_name: {0: "batch", **({1: "seq"} if ENCODERS[name].takes == "ids" else {})} for input_name in samples}
    output_axes = {"hidden": {0: "batch", **({1: "seq"} if ENCODERS[name].takes == "ids" else {})}}

    def create(path: Path) -> None:
        export_module(module(name, attention), samples, path, exporter=exporter, opset=opset, axes=axes, outputs=output_axes)

    digest = "-".join(
        [module_digest("support.encoders"), module_digest("torch_export"), torch.__version__, transformers.__version__]
    )
    return shared_file("encoders", digest, f"{name}.{style}.onnx", create)
