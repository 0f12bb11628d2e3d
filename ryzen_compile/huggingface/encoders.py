"""Encoders of Transformers: text or images in, the outputs of one task out, without caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ryzen_compile.errors import ModelError
from ryzen_compile.spec.interface import Inputs, InputSpec, Interface, TensorSpec
from ryzen_compile.spec.profile import input_shapes

if TYPE_CHECKING:
    import torch

    from ryzen_compile.text.tokenizer import TextTokenizer

BATCHES = (4, 1, 3, 8)
"""Batch sizes of the samples."""
_OFFSET_POSITIONS = frozenset(
    {"camembert", "data2vec-text", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"}
)
"""Architectures whose positions start after the id of the padding token, so that fewer remain for tokens."""


def text_encoder(model: torch.nn.Module, outputs: Sequence[str]) -> torch.nn.Module:
    """Wrap `model` as (input_ids, attention_mask[, token_type_ids]) -> the fields `outputs` of its result."""
    import torch

    class TextEncoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
        ) -> tuple[torch.Tensor, ...]:
            types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            result = self.model(input_ids=input_ids, attention_mask=attention_mask, **types)
            return tuple(getattr(result, name) for name in outputs)

    return TextEncoder(model).eval()


def image_encoder(model: torch.nn.Module, outputs: Sequence[str]) -> torch.nn.Module:
    """Wrap `model` as (pixel_values) -> the fields `outputs` of its result."""
    import torch

    class ImageEncoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            result = self.model(pixel_values=pixel_values)
            return tuple(getattr(result, name) for name in outputs)

    return ImageEncoder(model).eval()


def text_interface(config: Any, outputs: Sequence[TensorSpec], *, task: Any, takes_types: bool, max_tokens: int) -> Interface:
    """Return the interface of a text encoder for texts of at most `max_tokens` tokens."""
    inputs = [
        InputSpec(name="input_ids", dtype="int64", dims=("batch", "seq"), role="ids", low=0, high=config.vocab_size - 1),
        InputSpec(name="attention_mask", dtype="int64", dims=("batch", "seq"), role="mask", padding_value=0),
    ]
    if takes_types:
        high = config.type_vocab_size - 1
        inputs.append(InputSpec(name="token_type_ids", dtype="int64", dims=("batch", "seq"), low=0, high=high))
    return Interface(
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        batch="batch",
        task=task,
        typical_sizes={"batch": 8, "seq": min(64, max_tokens)},
        max_sizes={"batch": 16, "seq": min(256, max_tokens)},
    )


def image_interface(config: Any, outputs: Sequence[TensorSpec], *, task: Any) -> Interface:
    """Return the interface of an image encoder: images of the size in the configuration, normalized to about [-2.2, 2.7].

    Raises ModelError if the size is not one of images.
    """
    size = getattr(config, "image_size", 224)
    sizes = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if len(sizes) != 2 or not all(isinstance(pixels, int) and pixels > 0 for pixels in sizes):
        raise ModelError(
            f"the configuration has the image size {size}, which is not a height and a width",
            hint="correct `image_size` in config.json",
        )
    height, width = sizes
    channels = getattr(config, "num_channels", 3)
    pixels = InputSpec(name="pixel_values", dtype="float32", dims=("batch", channels, height, width), low=-2.2, high=2.7)
    return Interface(
        inputs=(pixels,),
        outputs=tuple(outputs),
        batch="batch",
        task=task,
        typical_sizes={"batch": 1},
        max_sizes={"batch": 8},
    )


def max_text_tokens(config: Any, tokenizer: TextTokenizer | None) -> int:
    """Return the largest number of tokens of a text: that of the tokenizer, and at most the positions of the model."""
    positions = int(getattr(config, "max_position_embeddings", None) or 512)
    if config.model_type in _OFFSET_POSITIONS:
        positions -= int(config.pad_token_id or 0) + 1
    limit = tokenizer.max_tokens if tokenizer is not None else None
    return max(1, positions if limit is None else int(min(positions, limit)))


def text_samples(
    interface: Interface, tokenizer: TextTokenizer, texts: Sequence[str], *, max_tokens: int
) -> Callable[[int], Iterator[Inputs]]:
    """Return a function from a seed to samples: `texts` in an order determined by the seed, in batches of BATCHES."""
    import numpy as np

    names = [spec.name for spec in interface.inputs]

    def samples(seed: int) -> Iterator[Inputs]:
        order = np.random.default_rng(seed).permutation(len(texts))
        start = 0
        for size in BATCHES:
            batch = tokenizer.encode_batch([texts[index] for index in order[start : start + size]], max_tokens=max_tokens)
            yield {name: batch[name] for name in names}
            start += size

    return samples


def synthetic_samples(interface: Interface) -> Callable[[int], Iterator[Inputs]]:
    """Return a function from a seed to samples with random values, in batches of BATCHES."""
    from ryzen_compile.data.synthetic import synthesize

    def samples(seed: int) -> Iterator[Inputs]:
        for index, batch in enumerate(BATCHES):
            sizes = {**interface.typical_sizes, "batch": batch}
            yield synthesize(interface, input_shapes(interface, sizes), seed=1000 * seed + index, rows="mixed")

    return samples
