"""Run a decoder with static caches step by step on ONNX Runtime, and pass its states from step to step."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.save import save
from ryzen_compile.registry import find_backend
from ryzen_compile.spec.interface import Interface
from support.ort_session import open_session

Array = np.ndarray[Any, Any]


class StepRunner:
    """A decoder with the states of a batch of sequences."""

    def __init__(self, model: ir.Model, batch: int, interface: Interface | None = None) -> None:
        self.session = open_session(model)
        self.interface = interface or interface_of(model)
        self.names = [entry.name for entry in self.session.get_outputs()]
        self.states = {}
        for state in self.interface.states:
            spec = self.interface.input(state.input)
            shape = [batch if isinstance(dim, str) else dim for dim in spec.dims or ()]
            self.states[state.input] = np.full(shape, state.initial_value, spec.dtype)

    def step(self, ids: Array, mask: Array | None = None) -> dict[str, Array]:
        """Run a step of `ids` (batch, seq) and return every output; `mask` is 1 for tokens and 0 for padding."""
        inputs = {**self.states, "input_ids": ids, "attention_mask": np.ones_like(ids) if mask is None else mask}
        outputs = dict(zip(self.names, self.session.run(None, inputs), strict=True))
        self.states = {state.input: outputs[state.output] for state in self.interface.states}
        return outputs

    def logits(self, ids: Array, chunks: Iterable[int]) -> Array:
        """Run `ids` (batch, seq) in steps of `chunks` tokens and return the logits (batch, seq, vocabulary)."""
        ends = itertools.accumulate(chunks, initial=0)
        return np.concatenate([self.step(ids[:, start:end])["logits"] for start, end in itertools.pairwise(ends)], axis=1)

    def ragged_logits(self, ids: Array, counts: Iterable[Sequence[int]]) -> list[Array]:
        """Return the logits (tokens, vocabulary) of each row after steps in which row i processes `counts[step][i]` tokens.

        The rows of a step are padded to the longest of them, and to at least one token.
        """
        rows = len(ids)
        logits: list[list[Array]] = [[] for _ in range(rows)]
        seen = np.zeros(rows, int)
        for step in counts:
            size = max(*step, 1)
            tokens = np.zeros((rows, size), np.int64)
            for row, count in enumerate(step):
                tokens[row, :count] = ids[row, seen[row] : seen[row] + count]
            outputs = self.step(tokens, (np.arange(size) < np.asarray(step)[:, None]).astype(np.int64))["logits"]
            for row, count in enumerate(step):
                logits[row].append(outputs[row, :count])
            seen += step
        return [np.concatenate(row) for row in logits]


def state_bytes(model: ir.Model) -> int:
    """Return the bytes of the states of one sequence."""
    interface = interface_of(model)
    specs = [interface.input(state.input) for state in interface.states]
    return sum(
        int(np.prod([1 if isinstance(dim, str) else dim for dim in spec.dims or ()])) * np.dtype(spec.dtype).itemsize
        for spec in specs
    )


def check_state_binding(model: ir.Model, ids: Array, step_size: int, folder: Path) -> None:
    """Check that states bound to device memory, as in the runtime, equal states passed by value from step to step.

    Each step has `step_size` tokens of `ids` (batch, tokens). Only bound states reveal a state that is overwritten before it is
    read.
    """
    save(model, folder / "decoder.onnx")
    reference = StepRunner(model, len(ids))
    shapes = {name: array.shape for name, array in reference.states.items()}
    with find_backend("onnxruntime").open(str(folder / "decoder.onnx")) as session:
        binding = session.bind_states(reference.interface.states, shapes)
        for start in range(0, ids.shape[1], step_size):
            tokens = ids[:, start : start + step_size]
            outputs = binding.run({"input_ids": tokens, "attention_mask": np.ones_like(tokens)})
            expected = reference.step(tokens)
            np.testing.assert_allclose(outputs["logits"], expected["logits"], rtol=0, atol=1e-5)
            for state in reference.interface.states:
                np.testing.assert_allclose(binding.read(state.name), expected[state.output], rtol=0, atol=1e-5)
        binding.close()
