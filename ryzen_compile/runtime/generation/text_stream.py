"""`TextStream`: the text that a decoder generates, in pieces as they become available."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ryzen_compile.utils.closeable import Closeable

if TYPE_CHECKING:
    from ryzen_compile.runtime.generation.generate import FinishReason, Generation
    from ryzen_compile.text.tokenizer import TextTokenizer


class TextStream(Closeable, Iterator[str]):
    """An iterator over the pieces of a generated text. `close`, or the end of a `with` block, ends the generation early."""

    def __init__(self, generation: Generation, tokenizer: TextTokenizer) -> None:
        """Stream the continuation of the only prompt of `generation`; nothing runs before the first piece is requested."""
        self._generation = generation
        self._tokens = generation.stream()
        self.tokens: list[int] = []
        """The ids generated so far, including the stop id if one ended the text."""
        self._pieces = tokenizer.decode_stream(self._record_tokens())

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the text ended; None before its end."""
        return self._generation.finish_reason(0)

    def __next__(self) -> str:
        """Return the next piece of text, one or more characters."""
        return next(self._pieces)

    def close(self) -> None:
        """End the generation and free its states; a second call has no effect."""
        self._tokens.close()

    def _record_tokens(self) -> Iterator[int]:
        for _, token in self._tokens:
            self.tokens.append(token)
            yield token
