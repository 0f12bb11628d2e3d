"""`TextTokenizer`: the tokenizer of a model, read from the files that Hugging Face folders contain."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ryzen_compile.errors import ModelError, RyzenError, UsageError
from ryzen_compile.text.chat_template import Message, render_chat

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = np.ndarray[Any, Any]

TOKENIZER_FILE = "tokenizer.json"
"""The tokenizer itself, in the format of the library `tokenizers`."""
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
"""The names of the special tokens, and in older folders the chat template."""
CHAT_TEMPLATE_FILE = "chat_template.jinja"
"""The chat template."""
GENERATION_CONFIG_FILE = "generation_config.json"
"""The ids that end a text."""
TEXT_FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, CHAT_TEMPLATE_FILE, GENERATION_CONFIG_FILE)
"""The names of all files of a tokenizer; the first one is required."""
_REPLACE_FILE = "replace it with an intact one, as in the folder that the weights are from, and export again"

ENCODED_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids"})
"""The inputs of encoders that `TextTokenizer.encode_batch` makes of texts."""


class TextTokenizer:
    """The tokenizer of a model. Thread-safe."""

    def __init__(self, files: Mapping[str, bytes | bytearray], *, source: str) -> None:
        """Read the tokenizer from `files`, {name: content} with names from TEXT_FILES; `source` names them in errors.

        Raises RyzenError if the library `tokenizers` is not installed or rejects the tokenizer, or if a file is no JSON object.
        """
        self._source = source
        self._tokenizer = _parse_tokenizer(files.get(TOKENIZER_FILE), source)
        self._config = _parse_json(files, TOKENIZER_CONFIG_FILE, source)
        self._generation_config = _parse_json(files, GENERATION_CONFIG_FILE, source)
        template = files.get(CHAT_TEMPLATE_FILE)
        self._chat_template = _chat_template(self._config) if template is None else bytes(template).decode("utf-8", "replace")

    @property
    def vocab_size(self) -> int:
        """The number of ids, including those of added tokens."""
        return int(self._tokenizer.get_vocab_size())

    @property
    def max_tokens(self) -> float | None:
        """The largest number of tokens of a text, which may be huge or infinite; None if the configuration has none."""
        limit = self._config.get("model_max_length")
        return limit if isinstance(limit, (int, float)) and limit > 0 else None

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end a text: those of the generation configuration, otherwise the end-of-sequence token."""
        ids = self._generation_config.get("eos_token_id")
        if ids is None:
            token = self._special_token("eos_token")
            ids = self._tokenizer.token_to_id(token) if token is not None else None
        return frozenset(int(value) for value in (ids if isinstance(ids, list) else [ids]) if isinstance(value, int))

    def encode(self, text: str) -> Array:
        """Return the ids of `text`, (tokens,) int64, with the special tokens that the model expects around a text."""
        return np.array(self._tokenizer.encode(text).ids, np.int64)

    def encode_batch(self, texts: Sequence[str], *, max_tokens: int) -> dict[str, Array]:
        """Return `input_ids`, `attention_mask` and `token_type_ids` of `texts`, (texts, tokens of the longest) int64 each.

        Texts are cut to `max_tokens` and padded on the right.
        """
        encodings = self._tokenizer.encode_batch(list(texts))
        for encoding in encodings:
            encoding.truncate(max_tokens)
        token = self._special_token("pad_token")
        pad_id = self._tokenizer.token_to_id(token) if token is not None else 0
        longest = max(len(encoding) for encoding in encodings)
        for encoding in encodings:
            encoding.pad(longest, pad_id=pad_id or 0)
        return {
            "input_ids": np.array([encoding.ids for encoding in encodings], np.int64),
            "attention_mask": np.array([encoding.attention_mask for encoding in encodings], np.int64),
            "token_type_ids": np.array([encoding.type_ids for encoding in encodings], np.int64),
        }

    def encode_chat(self, messages: Sequence[Message]) -> Array:
        """Return the ids of a conversation up to the start of the model's reply, (tokens,) int64.

        Raises UsageError if the model has no chat template, RyzenError if the template rejects the conversation.
        """
        if self._chat_template is None:
            raise UsageError(
                f"{self._source} has no chat template: the model continues text",
                hint='generate from text: engine.generate("text"), or ryzen-compile generate without --chat',
            )
        tokens = {
            key: token
            for key in ("bos_token", "eos_token", "pad_token", "unk_token")
            if (token := self._special_token(key)) is not None
        }
        text = render_chat(self._chat_template, messages, special_tokens=tokens, source=self._source)
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, without special tokens."""
        return str(self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True))

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of `ids` in pieces, each as soon as its characters are complete; special tokens are left out."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        tokens: list[int] = []
        length = 0
        for token in ids:
            tokens.append(int(token))
            piece = stream.step(self._tokenizer, tokens[-1])
            if piece:
                length += len(piece)
                yield piece
        if rest := self.decode(tokens)[length:]:  # bytes that are no complete character
            yield rest

    def _special_token(self, key: str) -> str | None:
        """Return the text of a special token, which older files store as an object."""
        value = self._config.get(key)
        if isinstance(value, dict):
            value = value.get("content")
        return value if isinstance(value, str) else None


def _parse_tokenizer(data: bytes | bytearray | None, source: str) -> Tokenizer:
    if data is None:
        raise RyzenError(f"{source} has no {TOKENIZER_FILE}", hint="export the model again from a folder that has one")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise RyzenError(f"the tokenizer cannot run: {error}", hint="pip install 'ryzen-compile[text]'") from error
    try:
        tokenizer: Tokenizer = Tokenizer.from_buffer(bytes(data))
    except Exception as error:  # the library raises plain exceptions
        raise RyzenError(
            f"the {TOKENIZER_FILE} of {source} cannot be read: {error}", hint="upgrade the package `tokenizers`"
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _parse_json(files: Mapping[str, bytes | bytearray], name: str, source: str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"the {name} of {source} is not valid JSON: {error}", hint=_REPLACE_FILE) from error
    if not isinstance(value, dict):
        raise ModelError(f"the {name} of {source} is not a JSON object", hint=_REPLACE_FILE)
    return value


def _chat_template(config: Mapping[str, Any]) -> str | None:
    """Return the chat template in a tokenizer's configuration: a text, or a list of named ones."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
