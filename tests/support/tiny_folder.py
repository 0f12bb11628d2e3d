"""Hugging Face folders of tiny models with random weights and a tokenizer that is trained on a few sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import BertModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from ryzen_compile.text.sample_texts import TEXTS

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>"]
VOCAB_SIZE = 384


def write_tokenizer(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """Write a byte-level BPE tokenizer that begins each text with `<bos>`."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=SPECIAL_TOKENS, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", pair="<bos> $A $B:1", special_tokens=[("<bos>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = dict.fromkeys(["lstrip", "normalized", "rstrip", "single_word"], False)
    pad = {"__type": "AddedToken", "content": "<pad>", "special": True, **flags}  # the form of older releases
    config: dict[str, Any] = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": pad}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_decoder(folder: Path, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB") -> Path:
    """Write a Llama decoder of 2 layers, 4 heads and 2 KV heads, whose tied embeddings are large enough to matter."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(folder)
    return folder


def write_encoder(folder: Path, model_class: Any = BertModel, *, classes: int = 2) -> Path:
    """Write an encoder of 2 layers with the class `model_class` of Transformers; a classifier has `classes` classes."""
    torch.manual_seed(0)
    config = model_class.config_class(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        num_labels=classes,
    )
    options = {"add_pooling_layer": False} if model_class is BertModel else {}
    model_class(config, **options).save_pretrained(folder)
    write_tokenizer(folder, chat_template=None)
    return folder


def write_image_classifier(folder: Path, *, classes: int) -> Path:
    """Write a ViT classifier of 1 layer for images of 32 x 48 pixels."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=(32, 48),
        num_labels=classes,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    return folder
