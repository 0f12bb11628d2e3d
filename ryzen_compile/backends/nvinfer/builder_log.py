"""`BuilderLog`: parses the builder log as it is emitted, and keeps only the current node, warnings, errors and layers."""

from __future__ import annotations

import re
from typing import Any

from ryzen_compile.backends import engine_layers
from ryzen_compile.backends.api import EngineLayers
from ryzen_compile.processes.crash_breadcrumb import CrashBreadcrumb

_MAX_MESSAGES = 50
"""The maximum number of warnings, and of errors, that are kept."""
_IGNORED = ("has Int64 binding",)
_PARSING = ("Parsing node: ", "Static check for parsing node: ")
_ATTENTION = "Registering attention: "
_SOURCE_LOCATION = re.compile(r"^\w+\.cpp:\d+: ")


class BuilderLog:
    """The log of one build or of one loaded engine."""

    def __init__(self, trt: Any, breadcrumb: CrashBreadcrumb | None = None) -> None:
        """Create `logger`, a logger of the bindings `trt`; `breadcrumb` records the node that is being parsed."""
        self._breadcrumb = breadcrumb
        self.errors: dict[str, None] = {}
        """The distinct error messages, in the order of their first occurrence."""
        self._warnings: dict[str, None] = {}
        self._attentions: list[str] = []
        self.op_types: dict[str, str] = {}
        """{node name: op type} of every node reached by the parser; an unnamed node is called `node_of_` + its output."""
        self.last_node = "", ""
        """The name and the op type of the node that the parser reached last."""
        self.layers: EngineLayers | None = None
        """The layers of the engine, once the builder has logged them."""
        verbose, warning = trt.ILogger.VERBOSE, trt.ILogger.WARNING
        failures = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)
        on_verbose, warnings, errors = self._on_verbose, self._warnings, self.errors

        class Logger(trt.ILogger):  # type: ignore[misc]
            def log(self, severity: Any, message: str) -> None:
                if severity == verbose:
                    on_verbose(message)
                elif severity == warning:
                    _add_message(warnings, message)
                elif severity in failures:
                    _add_message(errors, message)

        self.logger = Logger()

    def _on_verbose(self, message: str) -> None:
        if message.startswith(_PARSING):
            name, _, op = message[message.index(": ") + 2 :].rpartition(" ")
            self.last_node = name, op[1:-1]
            self.op_types[name] = op[1:-1]
            if self._breadcrumb:
                self._breadcrumb.write(f"parsing node `{name}` {op}")
        elif message.startswith(_ATTENTION):
            self._attentions.append(message[len(_ATTENTION) :].partition(" for ONNX node: ")[0])
        elif message.startswith(engine_layers.LAYERS_HEADING):
            self.layers = engine_layers.from_log(message, self._attentions)

    @property
    def attentions(self) -> tuple[str, ...]:
        """The names of the attention nodes of the graph."""
        return tuple(self._attentions)

    def error_summary(self) -> str:
        """Return the errors on one line; the empty string if there are none."""
        return "; ".join(self.errors)

    def warnings(self) -> tuple[str, ...]:
        """Return the first distinct warnings."""
        return tuple(self._warnings)


def _add_message(messages: dict[str, None], message: str) -> None:
    if len(messages) < _MAX_MESSAGES and not any(ignored in message for ignored in _IGNORED):
        messages[_SOURCE_LOCATION.sub("", message).strip()] = None
