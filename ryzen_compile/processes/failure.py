"""Description of how a child process ended without a result."""

from __future__ import annotations

import signal


def describe_exit(code: int) -> tuple[str, str]:
    """Return what happened to a process that ended with `code`, negative for a signal, and a hint."""
    if code == -signal.SIGKILL:
        return (
            "was killed",
            "the machine probably ran out of memory: free memory, use smaller shapes, or set --memory-limit",
        )
    if code < 0:
        return (
            f"crashed with {signal.Signals(-code).name}",
            "remove the node from the graph, or report the model that causes it",
        )
    return f"exited with code {code}", "report the model that causes the exit"


def with_operation(failure: str, operation: str, output: str = "") -> str:
    """Return a failure with the operation that the process performed and the end of its output, where they are known."""
    return f"{failure}{f' while {operation}' if operation else ''}{f': {output}' if output else ''}"
