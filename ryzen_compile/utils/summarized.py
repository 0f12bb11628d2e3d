"""Short forms of results for interpreters and notebooks."""

from __future__ import annotations

import html


class Summarized:
    """A result with a summary on one line, which is its form in an interpreter, and with more lines in a notebook."""

    __slots__ = ()

    @property
    def summary(self) -> str:
        """The result on one line."""
        raise NotImplementedError

    def _details(self) -> list[str]:
        """Return the lines that a notebook shows below the summary."""
        return []

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.summary}>"

    def _repr_html_(self) -> str:
        """Return the form that notebooks display."""
        lines = "\n".join([self.summary, *self._details()])
        return f"<b>{type(self).__name__}</b><pre>{html.escape(lines)}</pre>"
