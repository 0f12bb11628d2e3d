"""The builder's log, read as it streams by: where it is, what it warns of, what failed, what it built; nothing else is kept."""

from __future__ import annotations

import re
from typing import Any

from ryzen_compile.backends import engine_layers as reading
from ryzen_compile.backends.api import EngineLayers
from ryzen_compile.backends.process.crash_breadcrumb import CrashBreadcrumb

_MAX_MESSAGES = 50
"""Of warnings and of errors, how many are kept."""
_IGNORED = ("has Int64 binding",)
_PARSING = ("Parsing node: ", "Static check for parsing node: ")
_ATTENTION = "Registering attention: "
_SOURCE_LOCATION = re.compile(r"^\w+\.cpp:\d+: ")


class BuilderLog:
    """A listener for one build."""

    def __init__(self, trt: Any, breadcrumb: CrashBreadcrumb | None = None) -> None:
        """Make `logger`, a logger of the library `trt`; the node that is being parsed is noted in `recorder`."""
        self._breadcrumb = breadcrumb
        self.errors: dict[str, None] = {}
        """What failed, in the order it was said, each once."""
        self._warnings: dict[str, None] = {}
        self._attentions: list[str] = []
        self.op_types: dict[str, str] = {}
        """The op of every node that was come to, by the node's name; one without a name is `node_of_` and its output."""
        self.last_node = "", ""
        """The node that was come to last, and its op."""
        self.layers: EngineLayers | None = None
        """What the builder says that it built, once it does."""
        verbose, warning = trt.ILogger.VERBOSE, trt.ILogger.WARNING
        failures = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)
        hear, warnings, errors = self._on_verbose, self._warnings, self.errors

        class Logger(trt.ILogger):  # type: ignore[misc]
            def log(self, severity: Any, message: str) -> None:
                if severity == verbose:
                    hear(message)
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
        elif message.startswith(reading.LAYERS_HEADING):
            self.layers = reading.from_log(message, self._attentions)

    @property
    def attentions(self) -> tuple[str, ...]:
        """The attention nodes of the graph."""
        return tuple(self._attentions)

    def error_summary(self) -> str:
        """Return the errors, on one line; empty when there was none."""
        return "; ".join(self.errors)

    def warnings(self) -> tuple[str, ...]:
        """Return the first warnings, each once."""
        return tuple(self._warnings)


def _add_message(messages: dict[str, None], message: str) -> None:
    if len(messages) < _MAX_MESSAGES and not any(noise in message for noise in _IGNORED):
        messages[_SOURCE_LOCATION.sub("", message).strip()] = None
