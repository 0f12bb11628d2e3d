"""Running a decoder with fixed states step by step on ONNX Runtime, its states handed from step to step."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from ryzen_compile.graph.interface import interface_of
from ryzen_compile.interface import Interface

Array = np.ndarray[Any, Any]


class Stepper:
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
            self.states[state.input] = np.full(shape, state.initial, spec.dtype)

    def step(self, ids: Array, mask: Array | None = None) -> dict[str, Array]:
        """Run a step of `ids` (batch, seq), of which `mask` is 1 for tokens, and return every output."""
        feed = {**self.states, "input_ids": ids, "attention_mask": np.ones_like(ids) if mask is None else mask}
        outputs = dict(zip(self.names, self.session.run(None, feed), strict=True))
        self.states = {state.input: outputs[state.output] for state in self.interface.states}
        return outputs
