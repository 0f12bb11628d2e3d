"""Tiny decoders with seeded weights: 12 architectures in every export style, and variants of them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from torch_export import DYNAMO, TRACER, export_module

from ryzen_compile.utils.source_digest import module_digest
from support.ort_session import open_session
from support.shared_files import shared_file

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]

VOCABULARY, MAX_POSITIONS, LAYERS, HEADS, HIDDEN, WINDOW = 97, 1024, 2, 4, 64, 24
_IDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = {
    **_IDS,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": MAX_POSITIONS,
}
_GROUPED = {**_LLAMA, "num_key_value_heads": 2}
_GPT = {**_IDS, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": MAX_POSITIONS}
_FALCON = {
    **{name: value for name, value in _LLAMA.items() if name != "intermediate_size"},
    "new_decoder_architecture": False,
    "multi_query": True,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_GEMMA3 = {
    **_GROUPED,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"sliding_attention": _ROPE, "full_attention": {**_ROPE, "rope_theta": 1000000.0}},
}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_GROUPED, "head_dim": 16}),
    "mistral": ("MistralConfig", {**_GROUPED, "head_dim": 16, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 16}),
    "phi3": ("Phi3Config", {**_GROUPED, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}}),
    "gemma": ("GemmaConfig", {**_LLAMA, "num_key_value_heads": 1, "head_dim": 32}),
    "gemma3": ("Gemma3TextConfig", {**_GEMMA3, "sliding_window": WINDOW}),
    "gpt2": ("GPT2Config", _GPT),
    "falcon": ("FalconConfig", _FALCON),
    "bloom": ("BloomConfig", {**_IDS, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS}),
    "gptj": ("GPTJConfig", {**_GPT, "rotary_dim": 8}),
    "gpt-neox": ("GPTNeoXConfig", {**_LLAMA, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.25}}),
}
"""Architecture -> name of its Transformers configuration class, and the arguments of the class."""

SHORT_WINDOW = 5
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3, short window": ("Gemma3TextConfig", {**_GEMMA3, "sliding_window": SHORT_WINDOW}),
    "gemma2": (
        "Gemma2Config",
        {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0},
    ),
    "cohere2": ("Cohere2Config", {**_GROUPED, "layer_types": _GEMMA3["layer_types"], "sliding_window": WINDOW}),
    "smollm3": ("SmolLM3Config", {**_GROUPED, "no_rope_layers": [1, 0]}),
    "olmo2": ("Olmo2Config", _GROUPED),
    "granite": (
        "GraniteConfig",
        {
            **_GROUPED,
            "embedding_multiplier": 2.0,
            "logits_scaling": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
        },
    ),
    "stablelm": ("StableLmConfig", {**_GROUPED, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.25}}),
    "opt": (
        "OPTConfig",
        {
            **{name: value for name, value in _LLAMA.items() if name != "intermediate_size"},
            "ffn_dim": 96,
            "word_embed_proj_dim": HIDDEN,
        },
    ),
    "gpt-oss": (
        "GptOssConfig",
        {
            **_GROUPED,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": _GEMMA3["layer_types"],
        },
    ),
    **{
        f"llama, {name} rope": ("LlamaConfig", {**_GROUPED, "head_dim": 16, "rope_parameters": {"rope_theta": 10000.0, **rope}})
        for name, rope in {
            "linear": {"rope_type": "linear", "factor": 4.0},
            "llama3": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            "dynamic": {"rope_type": "dynamic", "factor": 4.0},
        }.items()
    },
    "phi3, longrope": (
        "Phi3Config",
        {
            **_GROUPED,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                **_ROPE,
                "rope_type": "longrope",
                "short_factor": [1.0 + 0.1 * n for n in range(8)],
                "long_factor": [2.0 + 0.3 * n for n in range(8)],
                "original_max_position_embeddings": 32,
            },
        },
    ),
}
"""Further architectures, for single tests."""

NO_POSITIONS = ("bloom",)
"""Architectures whose modules take no position ids."""


@dataclass(frozen=True, kw_only=True)
class ExportStyle:
    """How a decoder is exported."""

    exporter: str
    """`dynamo` and `tracer`: PyTorch exporters; `builder`: graphs written by hand as by ONNX Runtime GenAI."""
    opset: int
    mask: bool = True
    """Whether `attention_mask` (batch, past+seq) is an input."""
    positions: bool = True
    """Whether `position_ids` (batch, seq) is an input."""
    caches: bool = True
    attention: str = "sdpa"
    """Transformers implementation: `sdpa` if available, or `eager`.

    `scatter` is sdpa with the masks of Transformers < 4.53. `sliced` is sdpa as in Transformers 4, which slices the mask to the
    length of the repeated keys; Optimum exports it.
    """


STYLES = {
    **{f"dynamo-{opset}": ExportStyle(exporter=DYNAMO, opset=opset) for opset in (21, 23, 24)},
    **{
        f"dynamo-{opset}-bare": ExportStyle(exporter=DYNAMO, opset=opset, mask=False, positions=False) for opset in (21, 23, 24)
    },
    "optimum-sdpa": ExportStyle(exporter=TRACER, opset=18),
    "optimum-eager": ExportStyle(exporter=TRACER, opset=18, attention="eager"),
    "optimum-scatter": ExportStyle(exporter=TRACER, opset=18, attention="scatter"),
    "optimum-sliced": ExportStyle(exporter=TRACER, opset=18, attention="sliced"),
    "genai": ExportStyle(exporter="builder", opset=22, positions=False),
    "genai-rotary": ExportStyle(exporter="builder", opset=22),
    "genai-mha": ExportStyle(exporter="builder", opset=22),
    **{f"prefill-{opset}": ExportStyle(exporter=DYNAMO, opset=opset, positions=False, caches=False) for opset in (21, 23)},
    **{
        f"prefill-{opset}-bare": ExportStyle(exporter=DYNAMO, opset=opset, mask=False, positions=False, caches=False)
        for opset in (21, 23)
    },
}

GENAI_ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Architectures with hand-written graphs as by the model builder of ONNX Runtime GenAI."""

OPTIMUM_DIMS = {
    "batch": "batch_size",
    "seq": "sequence_length",
    "past": "past_sequence_length",
    "past+seq": "past_sequence_length + sequence_length",
}
"""Dim name -> name in Hugging Face Optimum."""


@functools.cache
def module(architecture: str, attention: str = "sdpa") -> torch.nn.Module:
    """Return the Transformers causal language model with deterministic weights."""
    import torch
    import transformers

    name, options = (ARCHITECTURES | VARIANTS)[architecture]
    config = getattr(transformers, name)(**options)
    model_class = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    config._experts_implementation = "eager"
    config._attn_implementation = attention if attention == "eager" or model_class._supports_sdpa else "eager"
    model = model_class(config).eval()
    _initialize(model, torch.Generator().manual_seed(0))
    return model


def _initialize(model: torch.nn.Module, rng: torch.Generator) -> None:
    """Fill the weights so that attention prefers some rows over others and every bias matters."""
    import torch
    from transformers.pytorch_utils import Conv1D

    with torch.no_grad():
        for part in model.modules():
            for name, weight in part.named_parameters(recurse=False):
                if isinstance(part, torch.nn.Embedding):
                    weight.normal_(std=0.5, generator=rng)
                elif weight.ndim == 2:
                    width = weight.shape[0] if isinstance(part, Conv1D) else weight.shape[1]
                    weight.normal_(std=1.5 * width**-0.5, generator=rng)
                elif name == "bias":
                    weight.normal_(std=0.2, generator=rng)
                else:
                    zero = type(part).__name__.startswith("Gemma")
                    weight.uniform_(-0.5 if zero else 0.5, 0.5 if zero else 1.5, generator=rng)


@functools.cache
def cache_size(architecture: str) -> tuple[int, int]:
    """Return (kv_heads, head_dim) of the caches."""
    import torch

    with torch.no_grad():
        keys = module(architecture)(torch.zeros(1, 1, dtype=torch.int64), use_cache=True).past_key_values.layers[0].keys
    return keys.shape[1], keys.shape[3]


def cache_names(prefix: str) -> list[str]:
    """Return the names of the caches, layer by layer."""
    return [f"{prefix}.{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")]


def torch_steps(architecture: str, ids: Array, chunks: Sequence[int], mask: Array | None = None) -> Array:
    """Return the module's logits (batch, tokens, vocabulary) for `ids` (batch, tokens), run in `chunks` over its own cache.

    `mask` (batch, tokens) is 1 for tokens and 0 for padding; positions count the tokens.
    """
    import torch
    from transformers import DynamicCache

    model = module(architecture)
    cache = DynamicCache(config=model.config)
    logits = []
    with torch.no_grad():
        for start, end in _spans(chunks):
            more = {}
            if mask is not None:
                more["attention_mask"] = torch.from_numpy(mask[:, :end])
                if architecture not in NO_POSITIONS:
                    more["position_ids"] = torch.from_numpy(positions(mask)[:, start:end])
            out = model(torch.from_numpy(ids[:, start:end]), past_key_values=cache, use_cache=True, **more)
            logits.append(out.logits.numpy())
    return np.concatenate(logits, axis=1)


def cached_steps(model: torch.nn.Module, cache: Any, ids: Array, chunks: Sequence[int]) -> Array:
    """Return the logits (batch, tokens, vocabulary) of `model` with `cache` and explicit positions, run in `chunks`."""
    import torch

    logits = []
    with torch.no_grad():
        for start, end in _spans(chunks):
            position_ids = torch.arange(start, end).expand(len(ids), end - start)
            out = model(torch.from_numpy(ids[:, start:end]), past_key_values=cache, use_cache=True, position_ids=position_ids)
            logits.append(out.logits.numpy())
    return np.concatenate(logits, axis=1)


def onnx_steps(architecture: str, style: str, ids: Array, chunks: Sequence[int], mask: Array | None = None) -> Array:
    """Return the logits (batch, tokens, vocabulary) of the exported graph on ONNX Runtime without graph optimizations."""
    session = open_session(export(architecture, style), optimizations="ORT_DISABLE_ALL")
    input_names = {entry.name for entry in session.get_inputs()}
    output_names = [entry.name for entry in session.get_outputs()]
    heads, width = cache_size(architecture)
    padded_mask = np.ones_like(ids) if mask is None else mask
    caches = dict.fromkeys(cache_names("past_key_values"), np.zeros((len(ids), heads, 0, width), np.float32))
    logits = []
    for start, end in _spans(chunks):
        inputs = {
            "input_ids": ids[:, start:end],
            "attention_mask": padded_mask[:, :end],
            "position_ids": positions(padded_mask)[:, start:end],
            **caches,
        }
        outputs = dict(zip(output_names, session.run(None, {name: inputs[name] for name in input_names}), strict=True))
        logits.append(outputs.pop("logits"))
        caches = {name.replace("present", "past_key_values"): value for name, value in outputs.items()}
    return np.concatenate(logits, axis=1)


def positions(mask: Array) -> Array:
    """Return the position of every token: the number of tokens before it in its row, and 0 for leading padding."""
    counted: Array = np.maximum(mask.cumsum(axis=1) - 1, 0)
    return counted


def _spans(chunks: Sequence[int]) -> Iterator[tuple[int, int]]:
    ends = np.cumsum(chunks)
    return ((int(end) - chunk, int(end)) for end, chunk in zip(ends, chunks, strict=True))


@functools.cache
def _sources_digest() -> str:
    """Return a digest of the code that exports: this package, and the versions of the libraries."""
    import torch
    import transformers
    from onnxscript import __version__ as onnxscript_version

    sources = [module_digest("support.decoders"), module_digest("torch_export")]
    return "-".join([*sources, torch.__version__, transformers.__version__, onnxscript_version, onnx.__version__])


@functools.cache
def export(architecture: str, style: str) -> Path:
    """Return the path of the exported graph, created once for all processes; exporter errors are propagated."""

    def create(path: Path) -> None:
        if STYLES[style].exporter == "builder":
            onnx.save(_build_genai(architecture, style), path)
        else:
            _export_with_torch(architecture, STYLES[style], path)

    return shared_file("exports", _sources_digest(), f"{architecture}.{style}.onnx", create)


def _export_with_torch(architecture: str, style: ExportStyle, path: Path) -> None:
    """Export with PyTorch and suppress its output."""
    import torch

    batch, seq, past = 2, 3, 5
    heads, width = cache_size(architecture)
    total = past + seq if style.caches else seq
    samples: dict[str, torch.Tensor] = {"input_ids": torch.arange(batch * seq).reshape(batch, seq)}
    axes = {"input_ids": {0: "batch", 1: "seq"}}
    if style.mask:
        samples["attention_mask"] = torch.ones(batch, total, dtype=torch.int64)
        axes["attention_mask"] = {0: "batch", 1: "past+seq" if style.caches else "seq"}
    if style.positions and architecture not in NO_POSITIONS:
        samples["position_ids"] = torch.arange(past, past + seq)[None].repeat(batch, 1)
        axes["position_ids"] = {0: "batch", 1: "seq"}
    if style.caches:
        samples |= {name: torch.ones(batch, heads, past, width) for name in cache_names("past_key_values")}
        axes |= dict.fromkeys(cache_names("past_key_values"), {0: "batch", 2: "past"})
    attention = "eager" if style.attention == "eager" else "sdpa"
    decoder = _decoder_module(module(architecture, attention), tuple(samples), caches=style.caches)
    caches = dict.fromkeys(cache_names("present"), {0: "batch", 2: "past+seq"}) if style.caches else {}
    output_axes = {"logits": {0: "batch", 1: "seq"}, **caches}
    if style.exporter == TRACER:
        axes, output_axes = (
            {name: {axis: OPTIMUM_DIMS[dim] for axis, dim in dims.items()} for name, dims in tensors.items()}
            for tensors in (axes, output_axes)
        )
    patches = {"scatter": _scatter_masks, "sliced": _sliced_masks}
    with patches.get(style.attention, nullcontext)():
        export_module(decoder, samples, path, exporter=style.exporter, opset=style.opset, axes=axes, outputs=output_axes)


def _decoder_module(model: torch.nn.Module, inputs: tuple[str, ...], *, caches: bool) -> torch.nn.Module:
    """Return a module from the tensors named `inputs` to (logits, key 0, value 0, ...)."""
    import torch
    from transformers import DynamicCache

    class ExportedDecoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            given = dict(zip(inputs, tensors, strict=True))
            pasts = [given.pop(name) for name in inputs if name.startswith("past_key_values")]
            if not caches:
                return (self.model(**given, use_cache=False).logits,)
            cache = DynamicCache(zip(pasts[::2], pasts[1::2], strict=True))
            out = self.model(**given, past_key_values=cache, use_cache=True)
            return (out.logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))

    return ExportedDecoder().eval()


@contextmanager
def _sliced_masks() -> Iterator[None]:
    """Use the sdpa attention of Transformers 4, which repeats the keys and slices the mask to their length."""
    import torch
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        key, value = (repeat_kv(tensor, query.shape[1] // tensor.shape[1]) for tensor in (key, value))
        if attention_mask is not None:
            attention_mask = attention_mask[:, :, :, : key.shape[-2]]
        output, _ = sdpa_attention_forward(torch.nn.Module(), query, key, value, attention_mask, **options)
        return output, None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


@contextmanager
def _scatter_masks() -> Iterator[None]:
    """Use the masks of Transformers < 4.53: a float mask into which the padding is written."""
    import torch
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    def mask(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: Any,
        attention_mask: torch.Tensor,
        local_size: int | None = None,
        **_: Any,
    ) -> torch.Tensor:
        low = torch.finfo(torch.float32).min
        query = (torch.arange(q_length) + q_offset).reshape(-1, 1)
        key = torch.arange(kv_length)
        hidden = key > query
        causal = torch.full((q_length, kv_length), low)
        if local_size is None:
            causal = torch.triu(causal, diagonal=1)
        else:
            hidden = torch.bitwise_or(hidden, key <= query - local_size)
        causal = causal * hidden
        causal = causal[None, None, :, :].expand(batch_size, 1, -1, -1).clone()
        length = attention_mask.shape[-1]
        padding = causal[:, :, :, :length] + attention_mask[:, None, None, :]
        causal[:, :, :, :length] = causal[:, :, :, :length].masked_fill(padding == 0, low)
        return causal

    for name in ("eager", "sdpa"):
        ALL_MASK_ATTENTION_FUNCTIONS[name] = mask
    try:
        yield
    finally:
        for name in ("eager", "sdpa"):
            del ALL_MASK_ATTENTION_FUNCTIONS[name]


_SEQUENCE_LENGTH_NODES = """
    axis = Constant <value = int64[1] {1}> ()
    rows = ReduceSum <keepdims = 0> (attention_mask, axis)
    last = Sub (rows, axis)
    seqlens_k = Cast <to = 6> (last)
    mask_shape = Shape (attention_mask)
    column = Constant <value = int64 {1}> ()
    columns = Gather <axis = 0> (mask_shape, column)
    total_sequence_length = Cast <to = 6> (columns)
"""
"""Inputs of GroupQueryAttention from the mask: the number of tokens per row minus 1, and the total length."""

_ATTENTION_BIAS_NODES = f"""
    zero = Constant <value = int64 {{0}}> ()  one = Constant <value = int64 {{1}}> ()  two = Constant <value = int64 {{2}}> ()
    three = Constant <value = int64 {{3}}> ()  minus = Constant <value = int64 {{-1}}> ()
    at0 = Constant <value = int64[1] {{0}}> ()  at1 = Constant <value = int64[1] {{1}}> ()
    at2 = Constant <value = int64[1] {{2}}> ()
    back = Constant <value = int64[1] {{-1}}> ()  end = Constant <value = int64[1] {{9223372036854775807}}> ()
    seen = Constant <value = float {{0}}> ()  whole = Constant <value = float {{1}}> ()
    low = Constant <value = float {{-3.4028234663852886e+38}}> ()
    past_shape = Shape ("past_key_values.0.key")  past = Gather <axis = 0> (past_shape, two)
    ids_shape = Shape (input_ids)  seq = Gather <axis = 0> (ids_shape, one)  both = Add (seq, past)
    total1 = Unsqueeze (both, at0)  seq1 = Unsqueeze (seq, at0)  seq2 = Unsqueeze (seq, at0)  seq3 = Unsqueeze (seq, at0)
    square = Concat <axis = 0> (seq1, seq2)
    full = ConstantOfShape <value = float[1] {{-3.4028234663852886e+38}}> (square)
    full_shape = Shape (full)  side1 = Slice (full_shape, back, end, at0)  side = Squeeze (side1, at0)
    side2 = Unsqueeze (side, at0)  tall = Concat <axis = 0> (side2, at1)
    column = Range (zero, side, one)  next = Add (column, one)  row = Reshape (next, tall)
    before = Less (column, row)  triangle = Where (before, seen, full)
    triangle3 = Unsqueeze (triangle, at0)  triangle4 = Unsqueeze (triangle3, at1)
    ids_shape1 = Shape (input_ids)  batch = Gather <axis = 0> (ids_shape1, zero)  batch1 = Unsqueeze (batch, at0)
    causal_shape = Concat <axis = 0> (batch1, at1, seq3, total1)
    causal_rank = Shape (causal_shape)  causal_ones = ConstantOfShape <value = int64[1] {{1}}> (causal_rank)
    causal_minus = Mul (causal_ones, minus)  causal_free = Equal (causal_shape, causal_minus)
    causal_to = Where (causal_free, causal_ones, causal_shape)  causal = Expand (triangle4, causal_to)
    mask3 = Unsqueeze (attention_mask, at1)  mask4 = Unsqueeze (mask3, at2)
    mask_shape = Shape (attention_mask)  mask_batch = Gather <axis = 0> (mask_shape, zero)
    mask_total = Gather <axis = 0> (mask_shape, one)
    mask_batch1 = Unsqueeze (mask_batch, at0)  mask_total1 = Unsqueeze (mask_total, at0)
    pad_shape = Concat <axis = 0> (mask_batch1, at1, seq3, mask_total1)
    pad_rank = Shape (pad_shape)  pad_ones = ConstantOfShape <value = int64[1] {{1}}> (pad_rank)
    pad_minus = Mul (pad_ones, minus)  pad_free = Equal (pad_shape, pad_minus)
    pad_to = Where (pad_free, pad_ones, pad_shape)  pad = Expand (mask4, pad_to)
    kept = Cast <to = 1> (pad)  hidden = Sub (whole, kept)  is_hidden = Cast <to = 9> (hidden)
    padding = Where (is_hidden, low, hidden)  biases = Add (padding, causal)
    heads = Constant <value = int64[4] {{1, {HEADS}, 1, 1}}> ()  bias = Tile (biases, heads)
"""
"""Input of MultiHeadAttention from the mask: a bias (batch, heads, seq, past+seq), for past 0 or seq 1."""


def _build_genai(architecture: str, style: str) -> onnx.ModelProto:
    """Build the graph of the GenAI model builder.

    `genai` has packed projections, `genai-rotary` separate RoPE nodes, and `genai-mha` an older MultiHeadAttention.
    """
    whole = module(architecture)
    model, heads, width = whole.model, *cache_size(architecture)
    packed, grouped = style == "genai", style != "genai-mha"
    norm = f"epsilon = {model.config.rms_norm_eps}"
    simple = f"SimplifiedLayerNormalization <axis = -1, {norm}, stash_type = 1>"
    skip = f"com.microsoft.SkipSimplifiedLayerNormalization <{norm}>"
    angles = np.arange(MAX_POSITIONS)[:, None] * model.config.rope_parameters["rope_theta"] ** -(np.arange(0, width, 2) / width)
    weights = {"embed": model.embed_tokens.weight, "head": whole.lm_head.weight.T, "norm": model.norm.weight}
    weights |= {"cos_cache": np.cos(angles), "sin_cache": np.sin(angles)}
    sizes = dict.fromkeys(["h0", f"x{LAYERS}"], HIDDEN)
    body = [
        _SEQUENCE_LENGTH_NODES if grouped else _ATTENTION_BIAS_NODES,
        "h0 = Gather (embed, input_ids)",
        f"x0 = {simple} (h0, before0)",
    ]
    for n, layer in enumerate(model.layers):
        mlp, after = layer.mlp, f"before{n + 1}" if n + 1 < LAYERS else "norm"
        weights |= {f"before{n}": layer.input_layernorm.weight, f"after{n}": layer.post_attention_layernorm.weight}
        weights |= {f"{name}_w{n}": getattr(mlp, f"{name}_proj").weight.T for name in ("gate", "up", "down")}
        weights[f"o_w{n}"] = layer.self_attn.o_proj.weight.T
        body += _projection_nodes(n, layer.self_attn, weights, packed=packed, simple=simple, width=width)
        normed = hasattr(layer.self_attn, "q_norm")
        body += (
            _group_query_attention_nodes(n, heads, width, packed=packed, normed=normed)
            if grouped
            else _multi_head_attention_nodes(n, heads, width)
        )
        body.append(f"""
            o{n} = MatMul (a{n}, o_w{n})  y{n}, , , r{n} = {skip} (h{n}, o{n}, after{n})
            gate{n} = MatMul (y{n}, gate_w{n})  up{n} = MatMul (y{n}, up_w{n})
            open{n} = Sigmoid (gate{n})  act{n} = Mul (gate{n}, open{n})  inner{n} = Mul (act{n}, up{n})
            down{n} = MatMul (inner{n}, down_w{n})  x{n + 1}, , , h{n + 1} = {skip} (r{n}, down{n}, {after})""")
        sizes |= dict.fromkeys([f"x{n}", f"o{n}", f"y{n}", f"r{n}", f"down{n}", f"h{n + 1}"], HIDDEN) | {f"a{n}": HEADS * width}
    past, total = (f"float[batch_size,{heads},{dim}_sequence_length,kv_cache_dim]" for dim in ("past", "total"))
    order = [f"{layer}.{kind}" for kind in ("key", "value") for layer in range(LAYERS)]
    inputs = ["int64[batch_size,sequence_length] input_ids", "int64[batch_size,total_sequence_length] attention_mask"]
    inputs += [] if packed else ["int64[batch_size,sequence_length] position_ids"]
    inputs += [f'{past} "past_key_values.{name}"' for name in order]
    outputs = [f"float[batch_size,sequence_length,{VOCABULARY}] logits", *(f'{total} "present.{name}"' for name in order)]
    known = [f"float[batch_size,sequence_length,{size}] {name}" for name, size in sizes.items()]
    proto = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 22, "com.microsoft" : 1]>
        decoder ({", ".join(inputs)}) => ({", ".join(outputs)}) <{", ".join(known)}> {{
            {" ".join(body)}  logits = MatMul (x{LAYERS}, head)
        }}""")
    arrays = {
        name: np.asarray(value.detach() if hasattr(value, "detach") else value, np.float32) for name, value in weights.items()
    }
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    return proto


def _projection_nodes(
    layer_index: int, attention: Any, weights: dict[str, Any], *, packed: bool, simple: str, width: int
) -> list[str]:
    """Return the nodes for the queries `q`, keys `k` and values `v` of a layer, or for a packed `qkv`; add their weights."""
    import torch

    n = layer_index
    parts = {name: getattr(attention, f"{name}_proj") for name in "qkv"}
    normed = hasattr(attention, "q_norm")
    body = []
    for name, made in [("qkv", list(parts.values()))] if packed else [(name, [part]) for name, part in parts.items()]:
        weights[f"{name}_w{n}"] = torch.cat([part.weight.T for part in made], dim=1)
        if made[0].bias is None:
            body.append(f"{name}{n} = MatMul (x{n}, {name}_w{n})")
        else:
            weights[f"{name}_b{n}"] = torch.cat([part.bias for part in made])
            body.append(f"{name}_{n} = MatMul (x{n}, {name}_w{n})  {name}{n} = Add ({name}_{n}, {name}_b{n})")
    if normed and packed:
        split = ", ".join(str(part.out_features) for part in parts.values())
        body.append(
            f"cut{n} = Constant <value = int64[3] {{{split}}}> ()  q{n}, k{n}, v{n} = Split <axis = -1> (qkv{n}, cut{n})"
        )
    for name in "qk" if normed else "":
        weights[f"{name}_norm{n}"] = getattr(attention, f"{name}_norm").weight
        body.append(f"""
            {name}_apart{n} = Constant <value = int64[3] {{0, -1, {width}}}> ()
            {name}_rows{n} = Reshape ({name}{n}, {name}_apart{n})  {name}_even{n} = {simple} ({name}_rows{n}, {name}_norm{n})
            {name}_wide{n} = Constant <value = int64[3] {{0, -1, {parts[name].out_features}}}> ()
            {name}_normed{n} = Reshape ({name}_even{n}, {name}_wide{n})""")
    for name in "" if packed else "qk":
        rotary = "com.microsoft.RotaryEmbedding <interleaved = 0, num_heads = 0, rotary_embedding_dim = 0>"
        plain = f"{name}_normed{n}" if normed else f"{name}{n}"
        body.append(f"{name}_turned{n} = {rotary} ({plain}, position_ids, cos_cache, sin_cache)")
    return body


def _group_query_attention_nodes(layer_index: int, heads: int, width: int, *, packed: bool, normed: bool) -> list[str]:
    """Return the GroupQueryAttention node, which updates the caches itself."""
    n = layer_index
    if packed:
        given = f"q_normed{n}, k_normed{n}, v{n}" if normed else f"qkv{n}, , "
    else:
        given = f"q_turned{n}, k_turned{n}, v{n}"
    caches = f'"past_key_values.{n}.key", "past_key_values.{n}.value"'
    tables = "cos_cache, sin_cache" if packed else ", "
    return [
        f"""
        a{n}, "present.{n}.key", "present.{n}.value" = com.microsoft.GroupQueryAttention <num_heads = {HEADS},
            kv_num_heads = {heads}, scale = {width**-0.5}, local_window_size = -1, softcap = 0.0, do_rotary = {int(packed)},
            rotary_interleaved = 0> ({given}, {caches}, seqlens_k, total_sequence_length, {tables}, , , )"""
    ]


def _multi_head_attention_nodes(layer_index: int, heads: int, width: int) -> list[str]:
    """Return the MultiHeadAttention over keys and values that are appended to the caches and repeated for every head."""
    n, body, copies = layer_index, [], HEADS // heads
    for name, new, kind in (("k", f"k_turned{n}", "key"), ("v", f"v{n}", "value")):
        at, cache = f"{name}{n}", f"{n}.{kind}"
        dims = "".join(
            f"{at}_dim{axis} = Gather <axis = 0> ({at}_shape, {place})  {at}_of{axis} = Unsqueeze ({at}_dim{axis}, at0)  "
            for axis, place in enumerate(("zero", "one", "two", "three"))
        )
        body.append(f"""
            {at}_heads = Constant <value = int64[4] {{0, 0, {heads}, -1}}> ()
            {at}_flat = Constant <value = int64[3] {{0, 0, {HEADS * width}}}> ()
            {at}_apart = Reshape ({new}, {at}_heads)  {at}_new = Transpose <perm = [0, 2, 1, 3]> ({at}_apart)
            "present.{cache}" = Concat <axis = 2> ("past_key_values.{cache}", {at}_new)
            {at}_shape = Shape ("present.{cache}")  {dims}
            {at}_copies = Constant <value = int64[1] {{{copies}}}> ()  {at}_times = Constant <value = int64 {{{copies}}}> ()
            {at}_five = Concat <axis = 0> ({at}_of0, {at}_of1, {at}_copies, {at}_of2, {at}_of3)
            {at}_all = Mul ({at}_of1, {at}_times)  {at}_four = Concat <axis = 0> ({at}_of0, {at}_all, {at}_of2, {at}_of3)
            {at}_line = Reshape ({at}_five, back)  {at}_rank = Shape ({at}_line)
            {at}_ones = ConstantOfShape <value = int64[1] {{1}}> ({at}_rank)  {at}_minus = Mul ({at}_ones, minus)
            {at}_free = Equal ({at}_line, {at}_minus)  {at}_to = Where ({at}_free, {at}_ones, {at}_line)
            {at}_unit = Unsqueeze ("present.{cache}", at2)  {at}_spread = Expand ({at}_unit, {at}_to)
            {at}_every = Reshape ({at}_spread, {at}_four)  {at}_turn = Transpose <perm = [0, 2, 1, 3]> ({at}_every)
            {at}_repeated = Reshape ({at}_turn, {at}_flat)""")
    attention = f"com.microsoft.MultiHeadAttention <num_heads = {HEADS}, scale = {width**-0.5}, unidirectional = 0>"
    return [
        *body,
        f"a{n} = {attention} (q_turned{n}, k{n}_repeated, v{n}_repeated, , , bias, , )",
    ]
