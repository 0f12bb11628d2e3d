"""The matrix of the tests of decoders: architecture x export style x pass stack, and which cells are in `make test`.

The other cells are marked `exhaustive` and run in `make test-all`: their exports take a quarter of an hour.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from ryzen_compile.spec.passes import Pass
from ryzen_passes.attention import Attention
from ryzen_passes.kv.compact import KvCompact
from ryzen_passes.kv.evict import KvEvict
from ryzen_passes.kv.select import KvSelect
from ryzen_passes.kv.static import KvStatic
from ryzen_passes.kv.window import KvWindow
from support.decoders import ARCHITECTURES, GENAI_ARCHITECTURES, STYLES

EXPORT, STATIC = "export", "static"
"""Stacks of a graph as exported, and with caches of fixed size for steps of any number of tokens."""
STEPS = 256
"""The number of tokens of which the stacks of KV passes evict none."""


def _step_stack(*passes: Pass, capacity: int = STEPS) -> tuple[Pass, ...]:
    return (KvStatic(capacity=capacity, step=1), *passes)


STACKS: dict[str, tuple[Pass, ...]] = {
    EXPORT: (),
    STATIC: (KvStatic(capacity=64),),
    "single-token": _step_stack(),
    "single-token, decomposed": _step_stack(Attention()),
    "evict": _step_stack(KvEvict(score="keydiff", budget=str(STEPS), rescore_interval=16)),
    "evict, pyramid": _step_stack(KvEvict(score="value-norm", budget=str(3 * STEPS // 2), pyramid=1.5), capacity=2 * STEPS),
    "window": _step_stack(KvWindow(sinks=4, window=STEPS - 4)),
    "select": _step_stack(KvSelect(page_size=16, selected_pages=STEPS // 16)),
    "compact": _step_stack(KvCompact(budget=str(STEPS), window=16, append_slots=16), capacity=2 * STEPS),
}
"""Stack -> its passes. All but `export` and `static` process one token per step."""

STEP_STACKS = tuple(stack for stack in STACKS if stack not in (EXPORT, STATIC))
STEP_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma3", "gpt2", "falcon", "bloom")
"""Architectures that are tested with STEP_STACKS."""
PREFILL_ARCHITECTURES = ("llama", "mistral", "gpt2", "falcon", "bloom")
"""Architectures that are also exported without caches."""

_DYNAMO_ATTENTION = ("dynamo-23", "dynamo-23-bare", "dynamo-24", "dynamo-24-bare", "prefill-23", "prefill-23-bare")
_ROTARY_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma3", "gpt-neox")
EXPORT_FAILURES = {
    ("falcon", style): "torch's translation of scaled_dot_product_attention asserts as many heads of keys as of queries"
    for style in _DYNAMO_ATTENTION
}
"""(architecture, style) that the exporter fails on -> reason."""
BATCH_ONE_ONLY = {
    (architecture, style): "RotaryEmbedding needs a row of cosines per sequence and gets one for all sequences"
    for architecture in _ROTARY_ARCHITECTURES
    for style in ("dynamo-23-bare", "prefill-23", "prefill-23-bare")
    if architecture in PREFILL_ARCHITECTURES or STYLES[style].caches
}
"""(architecture, style) whose graph only supports batch size 1 -> reason."""
STATIC_REFUSALS = {
    ("gptj", f"dynamo-{opset}-bare"): "its table of angles is looked up by a count of tokens that has no axis for the batch"
    for opset in (21, 23, 24)
}
"""(architecture, style) that kv-static refuses -> part of the reason."""
STACK_REFUSALS = {
    ("gpt2", "window"): "by a rotation",
    ("mistral", "select"): "there are no pages to select",
    **{("bloom", stack): "ALiBi" for stack in STEP_STACKS if not stack.startswith("single-token")},
}
"""(architecture, stack) that a pass refuses -> part of the reason."""

_EXPORTED_IN_MAKE_TEST = {
    *((architecture, "optimum-sdpa") for architecture in ARCHITECTURES),
    *(("llama", style) for style in ("dynamo-21", "dynamo-23-bare", "optimum-scatter", "prefill-23")),
    ("gemma3", "optimum-sliced"),
    *((architecture, "genai") for architecture in GENAI_ARCHITECTURES),
    *(("llama", style) for style in ("genai-rotary", "genai-mha")),
    ("mistral", "dynamo-23"),
    ("falcon", "dynamo-23"),
}
"""(architecture, style) whose export is in `make test`."""


@dataclass(frozen=True)
class MatrixCell:
    """A combination that is tested."""

    architecture: str
    style: str
    stack: str

    @property
    def in_make_test(self) -> bool:
        """Whether it is in `make test`: one export per architecture with `single-token`, llama with all stacks."""
        exported = (self.architecture, self.style) in _EXPORTED_IN_MAKE_TEST
        if self.stack in (EXPORT, STATIC):
            return exported
        return exported and self.style == "optimum-sdpa" and (self.architecture == "llama" or self.stack == "single-token")


def _cells() -> Iterator[MatrixCell]:
    for architecture in ARCHITECTURES:
        for style, how in STYLES.items():
            if how.exporter == "builder" and architecture not in GENAI_ARCHITECTURES:
                continue
            if not how.caches and architecture not in PREFILL_ARCHITECTURES:
                continue
            for stack in STACKS:
                if stack in (EXPORT, STATIC) or architecture in STEP_ARCHITECTURES:
                    yield MatrixCell(architecture, style, stack)


CELLS = tuple(_cells())
"""All cells; those whose export or kv-static fails are included, as their failures are tested as well."""


def cells(*stacks: str, without: Iterable[tuple[str, str]] = ()) -> list[Any]:
    """Return the cells of `stacks` as parameters (architecture, style, stack); of one stack, without the stack.

    `without` are pairs of architecture and style that are left out.
    """
    excluded = set(without)
    return [
        _param(cell, cell.architecture, cell.style, *([cell.stack] if len(stacks) > 1 else []))
        for cell in CELLS
        if cell.stack in stacks and (cell.architecture, cell.style) not in excluded
    ]


def exports(pairs: Iterable[tuple[str, str]]) -> list[Any]:
    """Return pairs of architecture and style as parameters."""
    return [_param(MatrixCell(*pair, EXPORT), *pair) for pair in pairs]


def _param(cell: MatrixCell, *values: str) -> Any:
    return pytest.param(*values, marks=() if cell.in_make_test else (pytest.mark.exhaustive,))


def architectures(first: str, *others: str) -> list[Any]:
    """Return architectures as parameters of a test; all but the `first` are marked `exhaustive`."""
    return [first, *(pytest.param(one, marks=pytest.mark.exhaustive) for one in others)]
