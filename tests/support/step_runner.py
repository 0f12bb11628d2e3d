"""Running a decoder with fixed states step by step on ONNX Runtime, its states handed from step to step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.save import save
from ryzen_compile.registry import find_backend
from ryzen_compile.spec.interface import Interface

Array = np.ndarray[Any, Any]


class StepRunner:
    """A batch of sequences under way."""

    def __init__(self, model: ir.Model, batch: int, interface: Interface | None = None) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        self.session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
        self.interface = interface or interface_of(model)
        self.names = [entry.name for entry in self.session.get_outputs()]
        self.states = {}
        for state in self.interface.states:
            spec = self.interface.input(state.input)
            shape = [batch if isinstance(dim, str) else dim for dim in spec.dims or ()]
            self.states[state.input] = np.full(shape, state.initial_value, spec.dtype)

    def step(self, ids: Array, mask: Array | None = None) -> dict[str, Array]:
        """Run a step of `ids` (batch, seq), of which `mask` is 1 for tokens, and return every output."""
        feed = {**self.states, "input_ids": ids, "attention_mask": np.ones_like(ids) if mask is None else mask}
        outputs = dict(zip(self.names, self.session.run(None, feed), strict=True))
        self.states = {state.input: outputs[state.output] for state in self.interface.states}
        return outputs


def check_state_binding(model: ir.Model, ids: Array, step_size: int, folder: Path) -> None:
    """Hold that states bound to memory, as the runtime has them, give what states handed on from step to step give.

    `ids` (batch, tokens) are fed `width` at a time. A state that is written over before it was read shows here alone.
    """
    save(model, folder / "decoder.onnx")
    handed = StepRunner(model, len(ids))
    shapes = {name: array.shape for name, array in handed.states.items()}
    with find_backend("onnxruntime").open(str(folder / "decoder.onnx")) as session:
        steps = session.bind_states(handed.interface.states, shapes)
        for at in range(0, ids.shape[1], step_size):
            tokens = ids[:, at : at + step_size]
            bound = steps.run({"input_ids": tokens, "attention_mask": np.ones_like(tokens)})
            expected = handed.step(tokens)
            np.testing.assert_allclose(bound["logits"], expected["logits"], rtol=0, atol=1e-5)
            for state in handed.interface.states:
                np.testing.assert_allclose(steps.read(state.name), expected[state.output], rtol=0, atol=1e-5)
        steps.close()
