"""Tests of `hf:FOLDER`: a Hugging Face folder as a recipe for export, comparison and samples."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_folder
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    RobertaForMaskedLM,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from ryzen_compile import api, registry
from ryzen_compile.errors import ModelError, RyzenError, UsageError
from ryzen_compile.exporter import export
from ryzen_compile.huggingface.model_folder import find_model_folder
from ryzen_compile.huggingface.weights import load_module
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.text_files import read_text_files
from ryzen_compile.torch_module import load_module as load_reference


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder.write_decoder(tmp_path_factory.mktemp("hf") / "tiny-llama")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder.write_encoder(tmp_path_factory.mktemp("hf") / "tiny-bert")


def test_folder_is_a_recipe_with_interface_samples_and_tokenizer(decoder: Path) -> None:
    recipe = registry.find_recipe(f"hf:{decoder}")
    assert recipe.name == "tiny-llama"
    assert [str(spec) for spec in recipe.interface.inputs[:4]] == [
        "input_ids: int64[batch, seq]",
        "attention_mask: int64[batch, past+seq]",
        "position_ids: int64[batch, seq]",
        "past_key_values.0.key: float32[batch, 2, past, 16]",
    ]
    assert len(recipe.interface.states) == 4
    assert recipe.text_files is not None
    files = recipe.text_files()
    assert sorted(files) == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert json.loads(files["generation_config.json"])["eos_token_id"] == 2
    text = {tuple(row) for sample in recipe.samples(0) for row in sample["input_ids"].tolist()}
    assert len(text) > 5
    assert all(0 <= token < tiny_folder.VOCAB_SIZE for row in text for token in row)


def test_export_writes_a_compared_graph_with_its_tokenizer(decoder: Path, tmp_path: Path) -> None:
    report = export(f"hf:{decoder}", tmp_path / "m.onnx")
    assert report.cases == 7
    model = ir.load(tmp_path / "m.onnx")
    assert interface_of(model) == registry.find_recipe(f"hf:{decoder}").interface
    assert read_text_files(model, tmp_path / "m.onnx")["tokenizer.json"] == (decoder / "tokenizer.json").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.text"]


def test_rewritten_graphs_keep_the_tokenizer(decoder: Path, tmp_path: Path) -> None:
    export(f"hf:{decoder}", tmp_path / "m.onnx")
    api.rewrite(tmp_path / "m.onnx", tmp_path / "r.onnx", passes="kv-static{capacity=64}")
    api.rewrite_steps(tmp_path / "m.onnx", tmp_path / "dec", passes="kv-static{capacity=64}", steps="1,any")
    for path in (tmp_path / "r.onnx", tmp_path / "dec" / "step-1.onnx", tmp_path / "dec" / "step-any.onnx"):
        assert read_text_files(ir.load(path), path)["tokenizer.json"] == (decoder / "tokenizer.json").read_bytes()


def test_missing_or_changed_tokenizer_file_is_refused(decoder: Path, tmp_path: Path) -> None:
    export(f"hf:{decoder}", tmp_path / "m.onnx")
    (tmp_path / "m.text" / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="is not the tokenizer file that .* was exported with"):
        read_text_files(ir.load(tmp_path / "m.onnx"), tmp_path / "m.onnx")
    shutil.rmtree(tmp_path / "m.text")
    with pytest.raises(ModelError, match="needs its tokenizer file"):
        api.rewrite(tmp_path / "m.onnx", tmp_path / "r.onnx", passes="fold")


def edit_config(folder: Path, **values: Any) -> None:
    """Set values in the configuration in `folder`."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def add_tensors(folder: Path, dtypes: Sequence[torch.dtype]) -> None:
    """Add a buffer of each type to the weights in `folder`."""
    file = folder / "model.safetensors"
    buffers = {f"buffer.{str(dtype).removeprefix('torch.')}": torch.arange(8).to(dtype) for dtype in dtypes}
    save_file(load_file(file) | buffers, file, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_in_shards_are_converted_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tiny_folder.write_decoder(tmp_path / "half", dtype=dtype, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    recipe = registry.find_recipe(f"hf:{folder}")
    actual = {
        name.removeprefix(
            "model.",
        ): tensor
        for name, tensor in recipe.make_module().state_dict().items()
    }
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) and tensor.dtype == torch.float32 for name, tensor in expected.items())


def test_buffers_of_other_types_do_not_prevent_the_conversion(tmp_path: Path) -> None:
    folder = tiny_folder.write_decoder(tmp_path / "half", dtype=torch.float16)
    expected = registry.find_recipe(f"hf:{folder}").make_module().state_dict()
    add_tensors(folder, [torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.int16, torch.bool])
    actual = registry.find_recipe(f"hf:{folder}").make_module().state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_element_type_without_a_conversion_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder.write_decoder(tmp_path / "tiny")
    file = folder / "model.safetensors"
    packed = torch.zeros((2, 4), dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    save_file(load_file(file) | {"packed": packed}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="have elements of the type F4, which is not converted to float32") as caught:
        registry.find_recipe(f"hf:{folder}").make_module()
    assert caught.value.hint is not None


@pytest.mark.parametrize("buffers", [(), (torch.int64, torch.bool)])
def test_weights_in_float32_are_mapped_not_copied(tmp_path: Path, buffers: tuple[torch.dtype, ...]) -> None:
    decoder = tiny_folder.write_decoder(tmp_path / "tiny")
    add_tensors(decoder, buffers)
    module = load_module(AutoModelForCausalLM, find_model_folder(str(decoder)))
    file = str((decoder / "model.safetensors").resolve())
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(file)]
    address = next(module.parameters()).data_ptr()
    assert any(int(start, 16) <= address < int(end, 16) for start, end in ranges)


def test_encoder_is_exported_for_feature_extraction(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_recipe, references = registry.find_recipe, []
    monkeypatch.setattr(registry, "find_recipe", lambda reference: references.append(reference) or find_recipe(reference))
    monkeypatch.chdir(tmp_path)
    report = export(f"hf:{encoder}")
    assert (report.path, references) == ("tiny-bert.onnx", [f"hf:{encoder}"])
    assert report.inputs == ("input_ids: int64[batch, seq]", "attention_mask: int64[batch, seq]")
    assert report.outputs == ("last_hidden_state: float32[batch, seq, 32]",)
    sample = next(iter(registry.find_recipe(f"hf:{encoder}").samples(0)))
    loaded = load_reference(f"hf:{encoder}").module
    expected = AutoModel.from_pretrained(encoder)(**{name: torch.from_numpy(array) for name, array in sample.items()})
    with torch.inference_mode():
        (actual,) = loaded(**{name: torch.from_numpy(array) for name, array in sample.items()})
    np.testing.assert_allclose(actual.numpy(), expected.last_hidden_state.detach().numpy(), atol=1e-5)


TEXT_INPUTS = ("input_ids: int64[batch, seq]", "attention_mask: int64[batch, seq]")
TYPES_INPUT = "token_type_ids: int64[batch, seq]"


@pytest.mark.parametrize(
    ("model_class", "inputs", "outputs"),
    [
        (BertForSequenceClassification, (*TEXT_INPUTS, TYPES_INPUT), ("logits: float32[batch, 3]",)),
        (BertForTokenClassification, TEXT_INPUTS, ("logits: float32[batch, seq, 3]",)),
        (
            BertForQuestionAnswering,
            (*TEXT_INPUTS, TYPES_INPUT),
            ("start_logits: float32[batch, seq]", "end_logits: float32[batch, seq]"),
        ),
        (RobertaForMaskedLM, TEXT_INPUTS, (f"logits: float32[batch, seq, {tiny_folder.VOCAB_SIZE}]",)),
        (ViTForImageClassification, ("pixel_values: float32[batch, 3, 32, 48]",), ("logits: float32[batch, 3]",)),
    ],
)
def test_graph_of_a_task_computes_what_transformers_computes(
    tmp_path: Path, model_class: Any, inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> None:
    folder = tmp_path / "tiny"
    if model_class is ViTForImageClassification:
        tiny_folder.write_image_classifier(folder, classes=3)
    else:
        tiny_folder.write_encoder(folder, model_class, classes=2 if model_class is BertForQuestionAnswering else 3)
    report = export(f"hf:{folder}", tmp_path / "m.onnx")
    assert (report.inputs, report.outputs) == (inputs, outputs)
    reference = model_class.from_pretrained(folder)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    names = [output.name for output in session.get_outputs()]
    for sample in registry.find_recipe(f"hf:{folder}").samples(0):
        with torch.inference_mode():
            expected = reference(**{name: torch.from_numpy(array) for name, array in sample.items()})
        for name, array in zip(names, session.run(names, sample), strict=True):
            np.testing.assert_allclose(array, expected[name].numpy(), atol=1e-5)


def test_task_that_the_weights_do_not_have_is_refused(encoder: Path) -> None:
    with pytest.raises(ModelError, match="has no weights for `bert.pooler.dense.bias` and 3 more parameters"):
        registry.find_recipe(f"hf:{encoder}#text-classification").make_module()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_another_shape_are_refused_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tiny_folder.write_decoder(tmp_path / "tiny", dtype=dtype)
    edit_config(folder, intermediate_size=128)
    with pytest.raises(ModelError, match=r"`tiny` has weights of another shape for `model\.layers\.0\.mlp.* and 5 more"):
        registry.find_recipe(f"hf:{folder}").make_module()


@pytest.mark.parametrize("shards", [False, True])
def test_files_that_transformers_does_not_read_are_ignored(tmp_path: Path, shards: bool) -> None:
    folder = tiny_folder.write_decoder(tmp_path / "tiny", dtype=torch.bfloat16, max_shard_size="40KB" if shards else "5GB")
    expected = registry.find_recipe(f"hf:{folder}").make_module().state_dict()
    digest = registry.recipe_digest(f"hf:{folder}")
    shutil.copyfile(sorted(folder.glob("*.safetensors"))[0], folder / "model.fp16.safetensors")
    actual = registry.find_recipe(f"hf:{folder}").make_module().state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert registry.recipe_digest(f"hf:{folder}") == digest


def test_missing_shard_and_damaged_index_are_refused(tmp_path: Path) -> None:
    folder = tiny_folder.write_decoder(tmp_path / "tiny", dtype=torch.bfloat16, max_shard_size="40KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"`{shard.name}` cannot be read: No such file"):
        registry.find_recipe(f"hf:{folder}").make_module()
    for content in ("{", "[]", '{"weight_map": {"a": "../m.safetensors"}}', '{"weight_map": {"a": 1}}'):
        (folder / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ModelError, match=r"the model\.safetensors\.index\.json of `tiny` is not an index of weights"):
            registry.find_recipe(f"hf:{folder}").make_module()


def test_folder_is_a_baseline_and_a_source_of_samples(decoder: Path, tmp_path: Path) -> None:
    export(f"hf:{decoder}", tmp_path / "m.onnx")
    report = api.compare(
        tmp_path / "m.onnx",
        f"hf:{decoder}",
        data=f"hf:{decoder}",
        as_given=True,
    )
    assert report.met
    first = registry.recipe_digest(f"hf:{decoder}")
    assert first == registry.recipe_digest(f"hf:{decoder}")
    copy = shutil.copytree(decoder, tmp_path / "other")
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert registry.recipe_digest(f"hf:{copy}") != first


@pytest.mark.parametrize("name", ["vocab.txt", "merges.txt", "qwen.tiktoken", "bpe.codes", "source.spm", "tokenizer.model.v3"])
def test_every_file_of_a_tokenizer_changes_the_digest(encoder: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(encoder, tmp_path / "copy")
    digests = []
    for content in ("a", "b"):
        (folder / name).write_text(content)
        digests.append(registry.recipe_digest(f"hf:{folder}"))
    assert digests[0] != digests[1]


def test_weights_that_are_never_read_do_not_change_the_digest(encoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(encoder, tmp_path / "copy")
    (folder / "onnx").mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    assert registry.recipe_digest(f"hf:{folder}") == registry.recipe_digest(f"hf:{encoder}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "tokenizer_config.json of `copy` is not valid JSON"),
        ("[]", "tokenizer_config.json of `copy` is not a JSON object"),
    ],
)
def test_damaged_tokenizer_configuration_is_refused(encoder: Path, tmp_path: Path, content: str, message: str) -> None:
    folder = shutil.copytree(encoder, tmp_path / "copy")
    (folder / "tokenizer_config.json").write_text(content)
    assert_refused(f"hf:{folder}", ModelError, message)


@pytest.mark.parametrize(("limit", "largest"), [("32", 32), ("1e30", 64), ("Infinity", 64), ("null", 64)])
def test_tokenizer_limits_the_tokens_of_a_text(encoder: Path, tmp_path: Path, limit: str, largest: int) -> None:
    folder = shutil.copytree(encoder, tmp_path / "copy")
    (folder / "tokenizer_config.json").write_text(f'{{"model_max_length": {limit}}}')
    assert registry.find_recipe(f"hf:{folder}").interface.max_sizes["seq"] == largest


def test_model_that_reads_no_tokens_is_refused_as_a_text_model(tmp_path: Path) -> None:
    config = ViTConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    ViTModel(config).save_pretrained(tmp_path / "vit")
    assert_refused(f"hf:{tmp_path}/vit", ModelError, "`vit` is a vit model, which reads no tokens")


def assert_refused(reference: str, error_type: type[RyzenError], message: str) -> None:
    with pytest.raises(error_type, match=message) as caught:
        registry.find_recipe(reference)
    assert caught.value.hint


def test_unusable_folders_are_refused_with_the_reason(decoder: Path, tmp_path: Path) -> None:
    assert_refused(f"hf:{tmp_path}/nowhere", UsageError, "there is no folder .*nowhere")
    assert_refused(f"hf:{tmp_path}", ModelError, "has no weights")
    assert_refused(f"hf:{decoder}#text-generatoin", UsageError, "there is no task `text-generatoin`")
    assert_refused(f"hf:{decoder}#fill-mask", UsageError, "is a llama model, for which Transformers has no fill-mask")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert_refused(f"hf:{tmp_path}", ModelError, "are pickles")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert_refused(f"hf:{tmp_path}", ModelError, r"has no config\.json")
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    assert_refused(f"hf:{tmp_path}", ModelError, "the configuration of .* cannot be read")
    assert_refused("hf:", UsageError, "there is no folder ``")


@pytest.mark.parametrize(
    ("values", "error_type", "message"),
    [
        ({"vocab_size": 0}, ModelError, "is a llama model, which reads no tokens"),
        ({"vocab_size": -3}, ModelError, "is a llama model, which reads no tokens"),
        ({"num_hidden_layers": 0}, ModelError, "has no KV caches"),
        ({"architectures": [3]}, UsageError, "is a 3, whose task is not known here"),
        ({"architectures": "No"}, UsageError, "is a No, whose task is not known here"),
    ],
)
def test_unusable_configurations_are_refused(
    decoder: Path, tmp_path: Path, values: dict[str, Any], error_type: type[RyzenError], message: str
) -> None:
    folder = shutil.copytree(decoder, tmp_path / "copy")
    edit_config(folder, **values)
    assert_refused(f"hf:{folder}", error_type, message)


def test_image_size_that_is_no_height_and_width_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder.write_image_classifier(tmp_path / "vit", classes=3)
    for size in ([32], [32, 0], [1, 2, 3]):
        edit_config(folder, image_size=size)
        assert_refused(
            f"hf:{folder}", ModelError, "which is not a height and a width|the configuration of `vit` cannot be read"
        )
