"""A GGUF file of a tiny decoder with 8-bit weights, random but for its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import torch
from gguf.quants import dequantize, quantize
from transformers import Qwen2Config, Qwen2ForCausalLM

from support import tiny_folder

WEIGHT_TYPE = gguf.GGMLQuantizationType.Q8_0


def write(path: Path) -> Qwen2ForCausalLM:
    """Write a Qwen2 decoder of 2 layers and a byte-level BPE tokenizer; return the model with the weights as quantized."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=tiny_folder.VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config).eval()
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, path)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        array = parameter.detach().numpy()
        if array.ndim == 2:
            quantized = quantize(array, WEIGHT_TYPE)
            parameter.data = torch.from_numpy(dequantize(quantized, WEIGHT_TYPE))
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), quantized, raw_dtype=WEIGHT_TYPE)
        else:
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _add_tokenizer(writer: gguf.GGUFWriter, path: Path) -> None:
    folder = path.parent / "tokenizer"
    tiny_folder.write_tokenizer(folder)
    bpe = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token in tiny_folder.SPECIAL_TOKENS else gguf.TokenType.NORMAL for token in tokens]
    )
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(tiny_folder.CHAT_TEMPLATE)
