"""Recipes made from Hugging Face folders: the task, the interface, the samples and the module of the model in a folder."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ryzen_compile.errors import ModelError, RyzenError, UsageError, printable
from ryzen_compile.huggingface import decoders, encoders
from ryzen_compile.huggingface.model_folder import ModelFolder, find_model_folder, split_location
from ryzen_compile.huggingface.weights import load_module
from ryzen_compile.spec.interface import TensorSpec
from ryzen_compile.spec.recipe import Recipe
from ryzen_compile.text.sample_texts import TEXTS
from ryzen_compile.text.tokenizer import TOKENIZER_FILE, TextTokenizer
from ryzen_compile.utils.source_digest import module_digest
from ryzen_compile.utils.user_script import error_text

if TYPE_CHECKING:
    import torch

_MAX_LOGITS_BYTES = 1 << 28
"""The size of the logits at the largest shapes of a derived profile of a decoder."""
_MAX_STEP, _MAX_PAST = 128, 2048
"""The largest number of new and of cached tokens of a derived profile of a decoder."""
_WRITE_SCRIPT = "write a file.py with a function that returns the module and its sample inputs"


@dataclass(frozen=True, kw_only=True)
class HuggingFaceTask:
    """A task of Hugging Face: the class of Transformers, the outputs, and the kind of comparison."""

    auto_class: str
    architectures: tuple[str, ...]
    """The ends of the names of the architectures whose folders have this task unless another one is requested."""
    outputs: Mapping[str, tuple[str, ...]]
    """{field of the result: dims}; `hidden`, `vocab` and `labels` are sizes of the configuration."""
    kind: Literal["embedding", "classifier", "language-model"] | None
    takes_types: bool = False
    """Whether the model has an input `token_type_ids`, if its architecture distinguishes types of tokens."""
    unused: tuple[str, ...] = ()
    """The prefixes of parameters that the outputs do not depend on."""


_TOKENS = ("batch", "seq")

TASKS: Mapping[str, HuggingFaceTask] = {
    "text-generation": HuggingFaceTask(
        auto_class="AutoModelForCausalLM", architectures=("ForCausalLM", "LMHeadModel"), outputs={}, kind="language-model"
    ),
    "text-classification": HuggingFaceTask(
        auto_class="AutoModelForSequenceClassification",
        architectures=("ForSequenceClassification",),
        outputs={"logits": ("batch", "labels")},
        kind="classifier",
        takes_types=True,
    ),
    "token-classification": HuggingFaceTask(
        auto_class="AutoModelForTokenClassification",
        architectures=("ForTokenClassification",),
        outputs={"logits": (*_TOKENS, "labels")},
        kind="classifier",
    ),
    "question-answering": HuggingFaceTask(
        auto_class="AutoModelForQuestionAnswering",
        architectures=("ForQuestionAnswering",),
        outputs={"start_logits": _TOKENS, "end_logits": _TOKENS},
        kind=None,
        takes_types=True,
    ),
    "fill-mask": HuggingFaceTask(
        auto_class="AutoModelForMaskedLM",
        architectures=("ForMaskedLM",),
        outputs={"logits": (*_TOKENS, "vocab")},
        kind="classifier",
    ),
    "image-classification": HuggingFaceTask(
        auto_class="AutoModelForImageClassification",
        architectures=("ForImageClassification",),
        outputs={"logits": ("batch", "labels")},
        kind="classifier",
    ),
    "feature-extraction": HuggingFaceTask(
        auto_class="AutoModel",
        architectures=("Model",),
        outputs={"last_hidden_state": (*_TOKENS, "hidden")},
        kind="embedding",
        unused=("pooler.",),
    ),
}
"""The tasks that are exported, by their names on the Hugging Face Hub."""


def make_recipe(location: str) -> Recipe:
    """Return the recipe of the model at `location`: a folder or a GGUF file, with `#TASK` for another task than its own.

    The weights are read when the recipe makes its module. Raises UsageError for a location or a task that does not exist,
    ModelError, with the reason, for a folder that Transformers cannot read.
    """
    path, task_name = split_location(location, TASKS)
    folder = find_model_folder(path)
    _check_transformers()
    task_name = task_name or default_task(folder)
    task = TASKS[task_name]
    auto_class = _auto_class(task)
    if type(folder.config) not in auto_class._model_mapping:
        raise UsageError(
            f"`{folder.name}` is a {folder.config.model_type} model, for which Transformers has no {task_name}",
            hint=f"its own task is {default_task(folder)}",
        )
    if task_name == "text-generation":
        return _decoder_recipe(folder, auto_class)
    if task_name == "image-classification":
        return _image_recipe(folder, task, auto_class)
    return _text_recipe(folder, task_name, task, auto_class)


def recipe_digest(location: str) -> str:
    """Return a digest of the code and of the files at `location`, in 16 hex digits; raises the errors of `make_recipe`."""
    import blake3

    path, task_name = split_location(location, TASKS)
    folder = find_model_folder(path)
    digest = blake3.blake3(f"{module_digest(__name__)} {task_name}".encode())
    for file in folder.files():
        digest.update(f" {file.name} ".encode())
        try:
            digest.update_mmap(file)
        except OSError as error:
            raise ModelError(
                f"`{printable(file)}` cannot be read: {error.strerror}", hint="make the file readable, or remove it"
            ) from error
    return digest.hexdigest()[:16]


def default_task(folder: ModelFolder) -> str:
    """Return the task of the architecture that the configuration names. Raises UsageError if there is none."""
    if folder.gguf_file is not None:
        return "text-generation"
    architectures = getattr(folder.config, "architectures", None) or ["Model"]
    architecture = str(architectures[0] if isinstance(architectures, list) else architectures)
    for name, task in TASKS.items():
        if architecture.endswith(task.architectures):
            return name
    raise UsageError(
        f"`{folder.name}` is a {printable(architecture)}, whose task is not known here",
        hint=f"select one with --task: {', '.join(TASKS)}; or write a file.py with a function that returns the module",
    )


def _check_transformers() -> None:
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise RyzenError(
            f"Hugging Face folders need PyTorch and Transformers: {error}", hint="pip install 'ryzen-compile[torch]'"
        ) from error


def _auto_class(task: HuggingFaceTask) -> Any:
    import transformers

    return getattr(transformers, task.auto_class)


def _describe(folder: ModelFolder, task_name: str) -> str:
    return f"{folder.name}, {folder.config.model_type}, {task_name}, weights of its folder"


def _decoder_recipe(folder: ModelFolder, auto_class: Any) -> Recipe:
    config = folder.config.get_text_config(decoder=True)
    max_positions = int(getattr(config, "max_position_embeddings", None) or 1 << 20)
    vocab_size = _vocab_size(folder, config, "text-generation")
    step = min(_MAX_STEP, max(1, max_positions // 2))
    batch = max(1, min(4, _MAX_LOGITS_BYTES // (step * vocab_size * 4)))
    past = max(1, min(_MAX_PAST, max_positions - step))
    interface = decoders.decoder_interface(
        vocab_size=vocab_size,
        max_positions=max_positions,
        layers=_cached_layers(folder, auto_class),
        typical_past=min(256, past),
        max_sizes={"batch": batch, "seq": step, "past": past},
    )
    text_files = functools.cache(folder.text_files)
    tokenizer = _tokenizer(folder, text_files())
    return decoders.decoder_recipe(
        name=folder.name,
        description=_describe(folder, "text-generation"),
        make_module=lambda: decoders.with_caches(load_module(auto_class, folder)),
        interface=interface,
        max_abs=None,
        make_ids=decoders.text_ids(tokenizer, TEXTS) if tokenizer is not None else None,
        text_files=text_files,
    )


def _cached_layers(folder: ModelFolder, auto_class: Any) -> list[decoders.CachedLayer]:
    """Return the sizes of the cache of each layer, from a run of the architecture without weights on one token."""
    import torch

    from ryzen_compile.huggingface.weights import attention_implementation
    from ryzen_compile.torch_module import suppress_output

    try:
        with suppress_output(), torch.device("meta"), torch.inference_mode():
            model = auto_class.from_config(
                folder.config, attn_implementation=attention_implementation(auto_class, folder.config)
            ).eval()
            cache = model(input_ids=torch.zeros((1, 1), dtype=torch.int64), use_cache=True).past_key_values
            shapes = [(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in cache.layers]
    except Exception as error:  # the architecture's own code
        raise ModelError(
            f"the KV caches of `{folder.name}` ({folder.config.model_type}) cannot be determined: {error_text(error)}",
            hint=_WRITE_SCRIPT,
        ) from error
    layers = []
    for index, (key, value) in enumerate(shapes):
        if len(key) != 4 or len(value) != 4 or key[:3] != value[:3] or key[2] != 1:
            raise ModelError(
                f"layer {index} of `{folder.name}` ({folder.config.model_type}) caches {key} and {value}, which are "
                "not keys and values of each token",
                hint="only decoders whose layers cache keys and values are exported",
            )
        layers.append(decoders.CachedLayer(kv_heads=key[1], key_dim=key[3], value_dim=value[3]))
    if not layers:
        raise ModelError(f"`{folder.name}` ({folder.config.model_type}) has no KV caches", hint=_WRITE_SCRIPT)
    return layers


def _tokenizer(folder: ModelFolder, files: Mapping[str, bytes]) -> TextTokenizer | None:
    return TextTokenizer(files, source=f"`{folder.name}`") if TOKENIZER_FILE in files else None


def _vocab_size(folder: ModelFolder, config: Any, task_name: str) -> int:
    """Return the number of ids of the model. Raises ModelError if it reads no tokens."""
    size = getattr(config, "vocab_size", None)
    if not isinstance(size, int) or size < 1:
        raise ModelError(
            f"`{folder.name}` is a {config.model_type} model, which reads no tokens, so it is not exported for {task_name}",
            hint=_WRITE_SCRIPT,
        )
    return size


def _output_specs(task: HuggingFaceTask, config: Any) -> list[TensorSpec]:
    sizes = {
        "hidden": getattr(config, "hidden_size", None),
        "vocab": getattr(config, "vocab_size", None),
        "labels": getattr(config, "num_labels", None),
    }
    return [
        TensorSpec(name=name, dtype="float32", dims=tuple(sizes.get(dim) or dim for dim in dims))
        for name, dims in task.outputs.items()
    ]


def _text_recipe(folder: ModelFolder, task_name: str, task: HuggingFaceTask, auto_class: Any) -> Recipe:
    config = folder.config
    _vocab_size(folder, config, task_name)
    text_files = functools.cache(folder.text_files)
    tokenizer = _tokenizer(folder, text_files())
    max_tokens = encoders.max_text_tokens(config, tokenizer)
    interface = encoders.text_interface(
        config,
        _output_specs(task, config),
        task=task.kind,
        takes_types=task.takes_types and getattr(config, "type_vocab_size", 0) > 1,
        max_tokens=max_tokens,
    )

    def make_module() -> torch.nn.Module:
        return encoders.text_encoder(load_module(auto_class, folder, unused=task.unused), list(task.outputs))

    return Recipe(
        name=folder.name,
        description=_describe(folder, task_name),
        make_module=make_module,
        interface=interface,
        samples=encoders.text_samples(interface, tokenizer, TEXTS, max_tokens=max_tokens)
        if tokenizer is not None
        else encoders.synthetic_samples(interface),
        max_abs=None,
        text_files=text_files,
    )


def _image_recipe(folder: ModelFolder, task: HuggingFaceTask, auto_class: Any) -> Recipe:
    interface = encoders.image_interface(folder.config, _output_specs(task, folder.config), task=task.kind)
    return Recipe(
        name=folder.name,
        description=_describe(folder, "image-classification"),
        make_module=lambda: encoders.image_encoder(load_module(auto_class, folder), list(task.outputs)),
        interface=interface,
        samples=encoders.synthetic_samples(interface),
        max_abs=None,
    )
