"""Roles and padding values of exported models: BERT, T5, CLIP, Whisper, ViT, PyTorch's own layers, and decoders.

Inputs are called `a` and `b`, so that nothing can be known from their names.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from support import decoders

from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.numerics.comparison import compare
from ryzen_compile.numerics.criteria import default_criteria
from ryzen_compile.numerics.grid import CaseSource
from ryzen_compile.numerics.onnx_candidates import onnx_candidate
from ryzen_compile.spec.profile import Profile

if TYPE_CHECKING:
    import torch

pytestmark = pytest.mark.slow
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
TOKENS = {0: "batch", 1: "seq"}
BATCH, SEQ = 2, 6


def transformer(name: str, config: str, **options: Any) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        import torch
        import transformers

        class ExportedEncoder(torch.nn.Module):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.model = getattr(transformers, name)(getattr(transformers, config)(**options))
                self.model.config.use_cache = False

            def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
                return self.model(input_ids=ids, attention_mask=mask).last_hidden_state

        return ExportedEncoder()

    return make


def left_padded_gpt2() -> torch.nn.Module:
    import torch
    from transformers import GPT2Config, GPT2Model

    class LeftPaddedDecoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = GPT2Model(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=16))

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            return self.model(ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state

    return LeftPaddedDecoder()


def pytorch_encoder(*, key_padding: bool) -> torch.nn.Module:
    import torch

    class PyTorchEncoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(99, 32)
            layer = torch.nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
            self.encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            masks = {"src_key_padding_mask" if key_padding else "mask": mask}
            return self.encoder(self.embed(ids), **masks)

    return PyTorchEncoder()


def pooled_lstm() -> torch.nn.Module:
    import torch

    class PooledRecurrence(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.lstm = torch.nn.Embedding(99, 32), torch.nn.LSTM(32, 16, batch_first=True)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            weights = mask.unsqueeze(-1).float()
            return (self.lstm(self.embed(ids))[0] * weights).sum(1) / weights.sum(1).clamp(min=1e-9)

    return PooledRecurrence()


BERT = {**SIZES, "vocab_size": 99}
TEXT_MODELS: dict[str, tuple[Callable[[], torch.nn.Module], str, Literal[0, 1], bool]] = {
    "bert": (transformer("BertModel", "BertConfig", **BERT), "int64", 0, True),
    "bert, eager": (transformer("BertModel", "BertConfig", **BERT, attn_implementation="eager"), "int64", 0, True),
    "t5 encoder": (
        transformer("T5EncoderModel", "T5Config", vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
        "int64",
        0,
        True,
    ),
    "clip text": (
        transformer("CLIPTextModel", "CLIPTextConfig", **BERT, max_position_embeddings=16, eos_token_id=2),
        "int64",
        0,
        True,
    ),
    "deberta": (
        transformer("DebertaV2Model", "DebertaV2Config", **BERT, relative_attention=True, pos_att_type=["p2c", "c2p"]),
        "int64",
        0,
        True,
    ),
    "xlnet": (
        transformer("XLNetModel", "XLNetConfig", vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=48),
        "int64",
        0,
        True,
    ),
    "gpt2, left padding": (left_padded_gpt2, "int64", 0, True),
    "torch encoder, key padding": (lambda: pytorch_encoder(key_padding=True), "bool", 1, True),
    "lstm, pooled": (pooled_lstm, "int64", 0, False),
}
"""Model -> module, element type of the mask, the value that marks padding, and whether the output has padding."""


def export(module: torch.nn.Module, inputs: dict[str, Any], axes: dict[str, dict[int, str]], path: Path) -> Path:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            str(path),
            dynamo=False,
            opset_version=17,
            dynamic_axes=axes,
            input_names=list(inputs),
            output_names=["y"],
        )
    return path


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_padding_values_of_text_models_are_derived_and_confirmed(model: str, tmp_path: Path) -> None:
    import torch

    make, dtype, padding_value, has_padding = TEXT_MODELS[model]
    mask = torch.ones(BATCH, SEQ, dtype=torch.int64) if dtype == "int64" else torch.zeros(BATCH, SEQ, dtype=torch.bool)
    inputs = {"a": torch.randint(3, 99, (BATCH, SEQ)), "b": mask}
    output = TOKENS if has_padding else {0: "batch"}
    # The tracer exports PyTorch's own attention for one shape.
    axes = {"a": TOKENS, "b": TOKENS, "y": output} if dtype == "int64" else {}
    path = export(make(), inputs, axes, tmp_path / "m.onnx")
    ids, spec = interface_of(load(path)).inputs
    assert (ids.role, ids.padding_value, spec.role, spec.padding_value) == ("ids", None, "mask", padding_value)
    candidate = onnx_candidate(path)
    shapes = dict.fromkeys(inputs, (BATCH, SEQ))
    result = compare(
        candidate,
        candidate,
        criteria=default_criteria(),
        case_source=CaseSource(profiles=[Profile(min=shapes, opt=shapes, max=shapes)]),
    )
    assert result.met
    assert [metric.name for metric in result.accuracy.metrics if metric.name == "left_out"] == ["left_out"] * has_padding
    assert not any("left out" in note for note in result.accuracy.notes)


def test_a_mask_of_pairs_of_tokens_marks_no_padding(tmp_path: Path) -> None:
    import torch

    inputs = {"a": torch.randint(3, 99, (BATCH, SEQ)), "b": torch.eye(SEQ, dtype=torch.bool).flip(0)}
    axes = {"a": TOKENS, "b": {0: "seq", 1: "seq"}, "y": TOKENS}
    path = export(pytorch_encoder(key_padding=False), inputs, axes, tmp_path / "m.onnx")
    spec = interface_of(load(path)).input("b")
    assert (spec.role, spec.padding_value, spec.is_padding_mask) == ("mask", 1, False)


def vision() -> tuple[torch.nn.Module, dict[str, Any]]:
    import torch
    from transformers import ViTConfig, ViTModel

    class PixelEncoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = ViTModel(ViTConfig(**SIZES, image_size=32, patch_size=8), add_pooling_layer=False)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.model(pixels).last_hidden_state

    return PixelEncoder(), {"a": torch.randn(BATCH, 3, 32, 32)}


def speech() -> tuple[torch.nn.Module, dict[str, Any]]:
    import torch
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    class SpeechEncoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = WhisperEncoder(
                WhisperConfig(
                    d_model=32,
                    encoder_layers=2,
                    encoder_attention_heads=4,
                    encoder_ffn_dim=48,
                    max_source_positions=16,
                    num_mel_bins=8,
                )
            )

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return self.model(features).last_hidden_state

    return SpeechEncoder(), {"a": torch.randn(BATCH, 8, 32)}


def masked_image() -> tuple[torch.nn.Module, dict[str, Any]]:
    import torch
    from transformers import BeitConfig, BeitModel

    class MaskedImageEncoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            config = BeitConfig(**SIZES, image_size=32, patch_size=8, use_mask_token=True)
            self.model = BeitModel(config, add_pooling_layer=False)
            torch.nn.init.normal_(self.model.embeddings.mask_token)

        def forward(self, pixels: torch.Tensor, is_masked: torch.Tensor) -> torch.Tensor:
            return self.model(pixels, bool_masked_pos=is_masked).last_hidden_state

    return MaskedImageEncoder(), {"a": torch.randn(BATCH, 3, 32, 32), "b": torch.rand(BATCH, 16) > 0.5}


@pytest.mark.parametrize("make", [vision, speech, masked_image])
def test_models_without_padding_leave_nothing_out(
    make: Callable[[], tuple[torch.nn.Module, dict[str, Any]]], tmp_path: Path
) -> None:
    """The patches that BEiT replaces by a mask token are no padding: they count."""
    module, inputs = make()
    path = export(module, inputs, dict.fromkeys([*inputs, "y"], {0: "batch"}), tmp_path / "m.onnx")
    interface = interface_of(load(path))
    assert interface.input("a").role == "values"
    assert all(spec.padding_value is None for spec in interface.inputs)
    candidate = onnx_candidate(path)
    shapes = {name: (2, *tensor.shape[1:]) for name, tensor in inputs.items()}
    source = CaseSource(profiles=[Profile(min=shapes, opt=shapes, max=shapes)])
    result = compare(candidate, candidate, criteria=default_criteria(), case_source=source)
    assert result.met
    assert all(metric.name != "left_out" for metric in result.accuracy.metrics)


STYLES = ("dynamo-23", "optimum-eager", "optimum-sdpa", "optimum-scatter", "genai", "genai-mha", "prefill-23")


@pytest.mark.parametrize("style", STYLES)
def test_padding_values_of_decoders_are_derived(style: str) -> None:
    interface = interface_of(load(decoders.export("llama", style)))
    assert interface.input("attention_mask").padding_value == 0
    assert all(spec.padding_value is None for spec in interface.inputs if spec.name != "attention_mask")
