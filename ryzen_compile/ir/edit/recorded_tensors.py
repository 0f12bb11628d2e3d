"""Keep the tensor names in a model's KV cache specification valid while a pass replaces tensors."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ryzen_compile.spec.kv_cache import read_kv_cache_spec, recorded_tensors, rename_tensors, write_kv_cache_spec


class RecordedTensors:
    """The tensors that the specification names, as they were when this object was created."""

    def __init__(self, model: ir.Model) -> None:
        self._model, self._spec = model, read_kv_cache_spec(model)
        names = recorded_tensors(self._spec) if self._spec is not None else frozenset()
        outputs = (value for node in model.graph for value in node.outputs)
        self._values = {value.name: value for value in (*model.graph.inputs, *outputs) if value.name in names}

    def follow(self, replacements: Mapping[ir.Value, ir.Value]) -> None:
        """Note that the keys of `replacements` were replaced by its values, which may be keys themselves."""
        for name, value in self._values.items():
            while value in replacements:
                value = replacements[value]
            self._values[name] = value

    def write(self) -> None:
        """Write the specification with the present names of the tensors, if one of them changed."""
        new_names = {old: value.name for old, value in self._values.items() if old and value.name and value.name != old}
        if self._spec is not None and new_names:
            write_kv_cache_spec(self._model, rename_tensors(self._spec, new_names))
