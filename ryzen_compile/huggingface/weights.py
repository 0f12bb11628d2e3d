"""Weights of Hugging Face folders as float32 modules whose parameters are mappings of files: pages that are read, not copies.

Weights in float32 are mapped where they are. Weights of other types are converted, one tensor at a time, to a temporary file
that is mapped; it takes disk space, not memory, until the module is freed.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile.artifacts.cache.scratch import scratch_folder
from ryzen_compile.artifacts.cache.store import default_folder
from ryzen_compile.errors import ModelError, RyzenError
from ryzen_compile.huggingface.model_folder import ModelFolder
from ryzen_compile.utils.files import is_disk_full

if TYPE_CHECKING:
    import torch

_SAFETENSORS_NAMES = {"float64": "F64", "float32": "F32", "int64": "I64", "int32": "I32", "uint8": "U8", "bool": "BOOL"}
"""The names of element types in the safetensors format, by the names of torch."""
_ELEMENT_BYTES = {
    "F64": 8,
    "F32": 4,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "C64": 8,
}
"""The bytes per element of the types that are written to a file; those of a folder that are floating point become F32."""
_SCRATCH_PREFIX = "weights."


def load_module(auto_class: Any, folder: ModelFolder, *, unused: tuple[str, ...] = ()) -> torch.nn.Module:
    """Return the module of `folder` in float32 and eval mode, created by the class `auto_class` of Transformers.

    `unused` holds the prefixes of parameters that may be missing, because the task does not use them. Raises ModelError if the
    weights are quantized, if parameters are missing, or if Transformers cannot create the module.
    """
    config = folder.config
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and folder.gguf_file is None:
        method = quantization.get("quant_method", "?") if isinstance(quantization, dict) else "?"
        raise ModelError(
            f"the weights of `{folder.name}` are quantized ({method}), which has no form in ONNX here",
            hint="export the model's unquantized folder; `build` converts to fp16 or bf16",
        )
    if folder.gguf_file is not None:
        return _load_gguf(auto_class, folder, unused)
    types = _element_types(folder)
    if unknown := sorted(dtype for dtype in types if dtype not in _ELEMENT_BYTES and not _is_converted(dtype)):
        raise ModelError(
            f"the weights of `{folder.name}` have elements of the type {unknown[0]}, which is not converted to float32",
            hint="export the model's unquantized folder; `build` converts to fp16 or bf16",
        )
    if not any(map(_is_converted, types)):
        return _load_safetensors(auto_class, folder, unused)
    with scratch_folder(default_folder(), _SCRATCH_PREFIX) as scratch:
        _write_float32(folder, scratch)
        # The mapping keeps the bytes of the file alive after its folder is removed.
        return _load_safetensors(auto_class, ModelFolder(scratch, copied_name=folder.name), unused)


def attention_implementation(auto_class: Any, config: Any) -> str:
    """Return the attention of Transformers to export: torch's own, or written out where the architecture has no other."""
    model_class = auto_class._model_mapping.get(type(config), None)
    if isinstance(model_class, (tuple, list)):
        model_class = model_class[0]
    return "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"


def _load_safetensors(auto_class: Any, folder: ModelFolder, unused: tuple[str, ...]) -> torch.nn.Module:
    return _read_complete(auto_class, folder, unused, use_safetensors=True).eval()


def _load_gguf(auto_class: Any, folder: ModelFolder, unused: tuple[str, ...]) -> torch.nn.Module:
    """Return the module of a GGUF file. Its weights are converted in memory, written to a file and mapped from there."""
    model = _read_complete(auto_class, folder, unused, **_dequantized())
    with scratch_folder(default_folder(), _SCRATCH_PREFIX) as scratch:
        file = scratch / "model.safetensors"
        parameters = dict(model.named_parameters())  # a tied parameter once
        _write_safetensors(file, iter(parameters.items()), [_tensor_info(*item) for item in parameters.items()])
        mapped = _map_tensors(file)
        for name, parameter in parameters.items():
            parameter.data = mapped[name]
    return model.eval()


def _dequantized() -> dict[str, Any]:
    """Return the option with which newer releases of Transformers convert a GGUF file to floating point."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _read_complete(auto_class: Any, folder: ModelFolder, unused: tuple[str, ...], **options: Any) -> torch.nn.Module:
    """Return the module that Transformers reads in float32. Raises ModelError if parameters are missing or of another shape."""
    import torch

    module: torch.nn.Module
    module, info = folder.read(
        "the model",
        auto_class.from_pretrained,
        dtype=torch.float32,
        attn_implementation=attention_implementation(auto_class, folder.config),
        ignore_mismatched_sizes=True,  # so that they are reported by name below
        output_loading_info=True,
        **options,
    )
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(unused))
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"])
    if missing or mismatched:
        problem = f"has no weights for `{missing[0]}`" if missing else f"has weights of another shape for `{mismatched[0]}`"
        count = len(missing) + len(mismatched)
        raise ModelError(
            f"`{folder.name}` {problem}{f' and {count - 1} more parameters' if count > 1 else ''}",
            hint="select the task that the weights are for with --task, or complete the folder",
        )
    return module


def _element_types(folder: ModelFolder) -> set[str]:
    from safetensors import SafetensorError, safe_open

    dtypes: set[str] = set()
    for file in folder.weight_files:
        try:
            with safe_open(file, framework="pt") as tensors:
                dtypes |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError) as error:
            raise ModelError(f"`{file.name}` cannot be read: {error}", hint="download the folder again") from error
    return dtypes


def _is_converted(dtype: str) -> bool:
    """Whether elements of the type are floating point and become F32."""
    return dtype in ("F64", "F16", "BF16") or dtype.startswith("F8_")


def _write_float32(folder: ModelFolder, scratch: Path) -> None:
    """Write the weights of `folder`, floating point ones as float32, and its configuration to the folder `scratch`."""
    from safetensors import safe_open

    infos: list[tuple[str, str, tuple[int, ...]]] = []
    for file in folder.weight_files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                view = tensors.get_slice(name)
                dtype = view.get_dtype()
                infos.append((name, "F32" if _is_converted(dtype) else dtype, tuple(view.get_shape())))

    def read() -> Iterator[tuple[str, torch.Tensor]]:
        for file in folder.weight_files:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    tensor = tensors.get_tensor(name)
                    yield name, tensor.float() if tensor.is_floating_point() else tensor

    _write_safetensors(scratch / "model.safetensors", read(), infos)
    for name in ("config.json", "generation_config.json"):
        if (folder.path / name).is_file():
            shutil.copyfile(folder.path / name, scratch / name)


def _tensor_info(name: str, tensor: torch.Tensor) -> tuple[str, str, tuple[int, ...]]:
    return name, _SAFETENSORS_NAMES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape)


def _write_safetensors(
    path: Path, tensors: Iterator[tuple[str, torch.Tensor]], infos: list[tuple[str, str, tuple[int, ...]]]
) -> None:
    """Write `tensors`, whose names, types and shapes are `infos` in the same order, one at a time. Raises RyzenError."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in infos:
        end = offset + math.prod(shape) * _ELEMENT_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 64)
    try:
        with open(path, "xb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            for _, tensor in tensors:
                file.write(memoryview(tensor.detach().contiguous().flatten().numpy()).cast("B"))
    except OSError as error:
        raise RyzenError(
            f"the converted weights cannot be written to `{path.parent}`: {error.strerror}",
            hint=f"free {offset / 1e9:.1f} GB of disk space there"
            if is_disk_full(error)
            else "set RYZEN_COMPILE_CACHE to another folder",
        ) from error


def _map_tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - not a mapping
