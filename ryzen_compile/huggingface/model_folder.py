"""`ModelFolder`: the files of a Hugging Face folder, checked before a framework reads them."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile.errors import ModelError, RyzenError, UsageError, did_you_mean, printable
from ryzen_compile.text.tokenizer import (
    CHAT_TEMPLATE_FILE,
    GENERATION_CONFIG_FILE,
    TEXT_FILES,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)
from ryzen_compile.utils.path_hints import similar_path
from ryzen_compile.utils.user_script import describe_error

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

_CONFIG_FILE = "config.json"
_SAFETENSORS = "*.safetensors"
_WEIGHTS_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
"""Names the shards of a sharded model."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w", re.ASCII)
"""The name of a model on the Hugging Face Hub: `ORGANIZATION/MODEL`."""
_WEIGHT_SUFFIXES = frozenset(
    {".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".pt", ".pth", ".safetensors"}
)
"""The suffixes of weights in the formats of several frameworks, of which a folder may have many GB."""


@dataclass(frozen=True)
class ModelFolder:
    """A folder with a model: its configuration, weights and tokenizer."""

    path: Path
    gguf_file: str | None = None
    """The name of the GGUF file that holds configuration, weights and tokenizer; None: they are files of the folder."""
    copied_name: str | None = None
    """The name of the folder that this one is a temporary copy of; None: it is no copy."""

    @property
    def name(self) -> str:
        """The name of the model: that of the GGUF file, or of the folder."""
        if self.copied_name is not None:
            return self.copied_name
        return Path(self.gguf_file).stem if self.gguf_file is not None else self.path.resolve().name

    @property
    def weight_files(self) -> list[Path]:
        """The files with the weights that Transformers reads, sorted: one file, or the shards that the index names.

        Raises ModelError if the index is invalid.
        """
        if self.gguf_file is not None:
            return [self.path / self.gguf_file]
        if (self.path / _WEIGHTS_FILE).is_file():
            return [self.path / _WEIGHTS_FILE]
        if (self.path / _INDEX_FILE).is_file():
            return [self.path / name for name in self._shard_names()]
        return sorted(self.path.glob(_SAFETENSORS))

    def _shard_names(self) -> list[str]:
        try:
            names = sorted(set(json.loads((self.path / _INDEX_FILE).read_bytes())["weight_map"].values()))
            valid = all(Path(name).name == name for name in names)
        except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
            valid = False
        if not valid:
            raise ModelError(f"the {_INDEX_FILE} of `{self.name}` is not an index of weights", hint="download the folder again")
        return names

    def files(self) -> list[Path]:
        """Return the files on which the model and its tokenizer may depend, sorted.

        In a folder these are all files, as vocabularies have many names, but those with weights in formats that are not read.
        Next to a GGUF file, whose folder may hold anything, these are files with the names of configurations and tokenizers.
        """
        patterns = ("*",) if self.gguf_file is None else ("*.json", "*.jinja", "*.model")
        found = {file for pattern in patterns for file in self.path.glob(pattern)}
        files = {file for file in found if file.suffix not in _WEIGHT_SUFFIXES and file.is_file()}
        return sorted(files.union(self.weight_files))

    @property
    def load_options(self) -> dict[str, Any]:
        """The arguments with which Transformers reads the folder: nothing is downloaded, no code of the folder is run."""
        gguf = {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        return {"pretrained_model_name_or_path": str(self.path), "local_files_only": True, "trust_remote_code": False, **gguf}

    @functools.cached_property
    def config(self) -> Any:
        """The configuration of Transformers. Raises ModelError if Transformers does not know the architecture."""
        from transformers import AutoConfig

        return self.read("the configuration", AutoConfig.from_pretrained)

    def read(self, what: str, function: Callable[..., Any], **options: Any) -> Any:
        """Return what `function` of Transformers reads from the folder. Raises ModelError, with the reason, if it fails."""
        from ryzen_compile.torch_module import suppress_output

        try:
            with suppress_output():
                return function(**self.load_options, **options)
        except ImportError as error:
            extra = "gguf" if self.gguf_file is not None else "torch"
            raise RyzenError(
                f"{what} of `{self.name}` cannot be read: {printable(error)}", hint=f"pip install 'ryzen-compile[{extra}]'"
            ) from error
        except Exception as error:  # Transformers raises exceptions of many types
            hint = "install a newer transformers, or write a file.py with a function that returns the module"
            if self.gguf_file is not None and "accelerate" in str(error):
                hint = "pip install 'ryzen-compile[gguf]'"
            raise ModelError(f"{what} of `{self.name}` cannot be read: {describe_error(error)}", hint=hint) from error

    def text_files(self) -> dict[str, bytes]:
        """Return the files of the tokenizer, {name: content}; empty if the folder has no tokenizer.

        A tokenizer in another format is converted to that of the library `tokenizers`. The file with the ids that end a text is
        made from the model's configuration if the folder has none.
        """
        files = {name: (self.path / name).read_bytes() for name in TEXT_FILES if (self.path / name).is_file()}
        if self.gguf_file is not None or TOKENIZER_FILE not in files:
            files |= self._converted_tokenizer()
        if TOKENIZER_FILE not in files:
            return {}
        if GENERATION_CONFIG_FILE not in files:
            ids = {
                key: value
                for key in ("bos_token_id", "eos_token_id")
                if (value := getattr(self.config.get_text_config(), key, None)) is not None
            }
            files[GENERATION_CONFIG_FILE] = json.dumps(ids).encode()
        return files

    def _converted_tokenizer(self) -> dict[str, bytes]:
        from transformers import AutoTokenizer

        if self.gguf_file is None and not (self.path / TOKENIZER_CONFIG_FILE).is_file():
            return {}
        tokenizer = self.read("the tokenizer", AutoTokenizer.from_pretrained)
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise ModelError(
                f"the tokenizer of `{self.name}`, {type(tokenizer).__name__}, has no form for the library `tokenizers`",
                hint="export a file.py with a function that returns the module, and pass ids to engine.generate",
            )
        special = {key: str(token) for key, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        files = {
            TOKENIZER_FILE: tokenizer.backend_tokenizer.to_str().encode(),
            TOKENIZER_CONFIG_FILE: json.dumps(special).encode(),
        }
        if tokenizer.chat_template:
            files[CHAT_TEMPLATE_FILE] = str(tokenizer.chat_template).encode()
        return files


def find_model_folder(location: str) -> ModelFolder:
    """Return the folder at `location`, a folder or a GGUF file. Raises UsageError or ModelError, with the reason."""
    path = Path(location)
    if path.is_file() and path.suffix == ".gguf":
        return ModelFolder(path.parent, path.name)
    if not location or not path.is_dir():
        raise _missing_folder(location)
    gguf_files = sorted(file.name for file in path.glob("*.gguf"))
    if not any(path.glob(_SAFETENSORS)):
        if len(gguf_files) == 1:
            return ModelFolder(path, gguf_files[0])
        if gguf_files:
            raise UsageError(
                f"`{printable(location)}` has {len(gguf_files)} GGUF files",
                hint=f"name one: hf:{printable(path / gguf_files[0])}",
            )
        if any(path.glob("*.bin")):
            raise ModelError(
                f"the weights in `{printable(location)}` are pickles, which run code when they are read, and are never opened",
                hint="convert them to safetensors: model.save_pretrained(FOLDER, safe_serialization=True)",
            )
        raise ModelError(
            f"`{printable(location)}` has no weights", hint="the folder must hold *.safetensors, or one .gguf file"
        )
    if not (path / _CONFIG_FILE).is_file():
        raise ModelError(f"`{printable(location)}` has no {_CONFIG_FILE}", hint="copy it from where the weights are from")
    return ModelFolder(path)


def _missing_folder(location: str) -> UsageError:
    path, name = Path(location), printable(location)
    if path.is_file():
        return UsageError(f"`{name}` is a file, not a folder", hint=f"give its folder: hf:{printable(path.parent)}")
    if location and (similar := similar_path(path)) is not None:
        return UsageError(f"there is no folder `{name}`", hint=f"did you mean `hf:{printable(similar)}`?")
    hint = "give a folder on this machine with config.json and *.safetensors, or a .gguf file; nothing is downloaded"
    if _HUB_NAME.fullmatch(location):
        hint = f"nothing is downloaded: hf download {name} --local-dir {path.name}, then give hf:{path.name}"
    return UsageError(f"there is no folder `{name}`", hint=hint)


def split_location(location: str, tasks: Collection[str]) -> tuple[str, str | None]:
    """Split `FOLDER#TASK`, or return `location` and None. Raises UsageError for an unknown task."""
    folder, separator, task = location.rpartition("#")
    if not separator or Path(location).exists():
        return location, None
    if task not in tasks:
        raise UsageError(f"there is no task `{printable(task)}`", hint=did_you_mean(task, list(tasks)))
    return folder, task
