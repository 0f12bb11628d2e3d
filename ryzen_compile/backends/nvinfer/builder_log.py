"""The builder's log, read as it streams by: where it is, what it warns of, what failed, what it built; nothing else is kept."""

from __future__ import annotations

import re
from typing import Any

from ryzen_compile.backends import engine_layers as reading
from ryzen_compile.backends.api import Layers
from ryzen_compile.backends.process.crash_breadcrumb import Recorder

_MOST = 50
"""Of warnings and of errors, how many are kept."""
_SAYS_NOTHING = ("has Int64 binding",)
_PARSING = ("Parsing node: ", "Static check for parsing node: ")
_ATTENTION = "Registering attention: "
_SOURCE = re.compile(r"^\w+\.cpp:\d+: ")


class Log:
    """A listener for one build."""

    def __init__(self, trt: Any, recorder: Recorder | None = None) -> None:
        """Make `logger`, a logger of the library `trt`; the node that is being parsed is noted in `recorder`."""
        self._recorder = recorder
        self.errors: dict[str, None] = {}
        """What failed, in the order it was said, each once."""
        self._warnings: dict[str, None] = {}
        self._attentions: list[str] = []
        self.ops: dict[str, str] = {}
        """The op of every node that was come to, by the node's name; one without a name is `node_of_` and its output."""
        self.last = "", ""
        """The node that was come to last, and its op."""
        self.layers: Layers | None = None
        """What the builder says that it built, once it does."""
        verbose, warning = trt.ILogger.VERBOSE, trt.ILogger.WARNING
        failures = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)
        hear, warnings, errors = self._hear, self._warnings, self.errors

        class Logger(trt.ILogger):  # type: ignore[misc]
            def log(self, severity: Any, message: str) -> None:
                if severity == verbose:
                    hear(message)
                elif severity == warning:
                    _keep(warnings, message)
                elif severity in failures:
                    _keep(errors, message)

        self.logger = Logger()

    def _hear(self, message: str) -> None:
        if message.startswith(_PARSING):
            name, _, op = message[message.index(": ") + 2 :].rpartition(" ")
            self.last = name, op[1:-1]
            self.ops[name] = op[1:-1]
            if self._recorder:
                self._recorder.note(f"parsing node `{name}` {op}")
        elif message.startswith(_ATTENTION):
            self._attentions.append(message[len(_ATTENTION) :].partition(" for ONNX node: ")[0])
        elif message.startswith(reading.HEADING):
            self.layers = reading.from_log(message, self._attentions)

    @property
    def attentions(self) -> tuple[str, ...]:
        """The attention nodes of the graph."""
        return tuple(self._attentions)

    def reason(self) -> str:
        """Return the errors, on one line; empty when there was none."""
        return "; ".join(self.errors)

    def warnings(self) -> tuple[str, ...]:
        """Return the first warnings, each once."""
        return tuple(self._warnings)


def _keep(kept: dict[str, None], message: str) -> None:
    if len(kept) < _MOST and not any(noise in message for noise in _SAYS_NOTHING):
        kept[_SOURCE.sub("", message).strip()] = None
