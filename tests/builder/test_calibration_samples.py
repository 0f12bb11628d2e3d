"""Calibration samples of a build: enough tokens that the large activations of rare ones are measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import tiny_decoder
from support.cache_entries import RecordingProgress

import ryzen_compile as rc
from ryzen_compile.artifacts.package.read import Package
from ryzen_compile.builder.calibration_samples import calibration_samples, calibration_shapes, text_tokenizer
from ryzen_compile.data.synthetic import synthesize
from ryzen_compile.errors import RyzenError
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.ir.save import save
from ryzen_compile.ir.text_files import write_text_files
from ryzen_compile.numerics.onnx_candidates import open_graph
from ryzen_compile.spec.interface import Inputs, InputSpec, Interface
from ryzen_compile.spec.profile import Profile, derive_profile
from ryzen_compile.text.sample_texts import TEXTS
from ryzen_compile.text.tokenizer import TextTokenizer

IDS = InputSpec(name="ids", dtype="int64", dims=("batch", "seq"), role="ids", low=0, high=999)
MASK = InputSpec(name="mask", dtype="int64", dims=("batch", "past+seq"), role="mask", padding_value=0, low=0, high=1)
PAST = InputSpec(name="past", dtype="float32", dims=("batch", 2, "past", 4), role="state")
RARE_IDS = 25
"""Every id that is a multiple of this has a large embedding."""


def interface(*inputs: InputSpec) -> Interface:
    return Interface(inputs=inputs, outputs=(), batch="batch")


def profile(seq: int, *, largest: int) -> Profile:
    return Profile(min={"ids": (1, 1)}, opt={"ids": (1, seq)}, max={"ids": (4, largest)})


@pytest.mark.parametrize(
    ("opt", "largest", "length", "count"),
    [(1, 1, 1, 64), (1, 64, 64, 8), (1, 2048, 256, 2), (512, 2048, 512, 2), (16, 16, 16, 32)],
)
def test_random_rows_of_tokens_are_long_and_many(opt: int, largest: int, length: int, count: int) -> None:
    samples = calibration_samples(interface(IDS), profile(opt, largest=largest), data=None, graph=Path(), seed=0).samples
    assert [sample["ids"].shape for sample in samples] == [(1, length)] * count
    assert len({sample["ids"].tobytes() for sample in samples}) > 1


def test_the_sizes_of_related_inputs_follow() -> None:
    decoder = interface(IDS, MASK, PAST)
    base = derive_profile(decoder)
    shapes = calibration_shapes(decoder, base)
    past = base.opt["past"][2]
    assert (shapes["ids"], shapes["mask"], shapes["past"]) == ((1, 256), (1, past + 256), (1, 2, past, 4))
    narrow = msgspec.structs.replace(base, max={**base.max, "mask": (1, past + 128)})
    assert calibration_shapes(decoder, narrow) == base.opt


def test_random_samples_are_bounded_in_bytes_and_no_more_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    state = InputSpec(name="cache", dtype="float32", dims=(1, 1000), role="state")
    shapes = {"ids": (1, 1), "cache": (1, 1000)}
    drawn: list[int] = []

    def draw(*arguments: Any, seed: int, **options: Any) -> Inputs:
        drawn.append(seed)
        return synthesize(*arguments, seed=seed, **options)

    monkeypatch.setattr("ryzen_compile.builder.calibration_samples.synthesize", draw)
    for limit, count in ((10_000, 2), (1, 1)):
        monkeypatch.setattr("ryzen_compile.builder.calibration_samples.MAX_KEPT_BYTES", limit)
        samples = calibration_samples(
            interface(IDS, state), Profile(min=shapes, opt=shapes, max=shapes), data=None, graph=Path(), seed=7
        ).samples
        assert len(samples) == count
        assert drawn == list(range(7, 7 + count))
        drawn.clear()


def test_a_model_without_tokens_is_measured_at_its_opt_shapes() -> None:
    spec = InputSpec(name="ids", dtype="float32", dims=("batch", "seq"))
    samples = calibration_samples(interface(spec), profile(8, largest=512), data=None, graph=Path(), seed=0).samples
    assert [sample["ids"].shape for sample in samples] == [(1, 8)] * 4


def save_language_model(path: Path) -> Path:
    """Write a model whose residual stream reaches 90,000 at some tokens and 3 at all others."""
    rng = np.random.default_rng(0)
    table = rng.uniform(-1, 1, (1000, 8)).astype(np.float32)
    table[::RARE_IDS, 0] = 30_000
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["h0"], name="embed"),
        helper.make_node("Add", ["h0", "h0"], ["h1"], name="first"),
        helper.make_node("Add", ["h1", "h0"], ["h2"], name="second"),
        helper.make_node("LayerNormalization", ["h2", "gain"], ["n"], name="norm"),
        helper.make_node("MatMul", ["n", "head"], ["logits"], name="head"),
    ]
    weights: dict[str, Any] = {"table": table, "gain": np.ones(8, np.float32), "head": rng.standard_normal((8, 50))}
    graph = helper.make_graph(
        nodes,
        "lm",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", 1])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, 50])],
        [numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


@pytest.fixture
def built(tmp_path: Path) -> tuple[Package, list[str]]:
    source = save_language_model(tmp_path / "lm.onnx")
    progress = RecordingProgress()
    package = rc.build(source, gpu="sm89", precision="fp16", compare=False, cache=False, progress=progress)
    return package, [str(diagnostic) for diagnostic in progress.diagnostics if diagnostic.severity == "warning"]


def test_the_residual_stream_of_rare_tokens_stays_in_fp32(built: tuple[Package, list[str]]) -> None:
    package, _ = built
    graph = package.manifest.graphs[0]
    samples = calibration_samples(graph.interface, graph.profiles[0], data=None, graph=Path(), seed=0).samples
    assert all((sample["ids"] % RARE_IDS).all() for sample in samples[:4]), "four single tokens show no large value"
    variant = next(variant for variant in graph.variants if variant.precision == "fp16")
    assert any("second: overflow:" in note for record in variant.passes for note in record.notes)
    with open_graph(package.path / variant.path, "fp16")() as run:
        logits = run({"ids": np.array([[0], [1], [RARE_IDS]])})["logits"]
    assert np.isfinite(logits).all()


def test_ranges_of_random_ids_and_the_missing_comparison_are_warnings_that_the_package_records(
    built: tuple[Package, list[str]],
) -> None:
    package, warnings = built
    assert any("`precision{to=fp16}`: the ranges come from token ids drawn from a seed" in warning for warning in warnings)
    assert any("fp16 without a comparison" in warning for warning in warnings)
    recorded = [
        warning for variant in package.manifest.graphs[0].variants for record in variant.passes for warning in record.warnings
    ]
    assert len(recorded) == 1


def save_with_tokenizer(path: Path) -> Path:
    """Write the model of `save_language_model` with a tokenizer of six words."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: RARE_IDS * index for index, word in enumerate(["[UNK]", "the", "and", "a", "of", "in"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model = load(save_language_model(path))
    write_text_files(model, path, {"tokenizer.json": tokenizer.to_str().encode()}, folder="lm.text")
    save(model, path)
    return path


def test_without_the_library_tokenizers_ids_are_random_and_the_tokenizer_names_the_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_with_tokenizer(tmp_path / "lm.onnx")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(RyzenError, match="the tokenizer cannot run") as caught:
        text_tokenizer(load(source), source)
    assert caught.value.hint == "pip install 'ryzen-compile[text]'"
    progress = RecordingProgress()
    rc.build(source, gpu="sm89", precision="fp16", compare=False, cache=False, progress=progress)
    assert any("the ranges come from token ids drawn from a seed" in str(diagnostic) for diagnostic in progress.diagnostics)


def test_a_tokenizer_next_to_the_graph_gives_texts_in_place_of_random_ids(tmp_path: Path) -> None:
    source = save_with_tokenizer(tmp_path / "lm.onnx")
    progress = RecordingProgress()
    package = rc.build(source, gpu="sm89", precision="fp16", cache=False, progress=progress)
    assert [diagnostic for diagnostic in progress.diagnostics if diagnostic.severity == "warning"] == []
    records = [record for variant in package.manifest.graphs[0].variants for record in variant.passes]
    (precision,) = [record for record in records if record.pass_spec == "precision{to=fp16}"]
    assert "ranges measured on 64 samples of short texts" in precision.reason
    assert any("second: overflow:" in note for note in precision.notes)


def two_word_tokenizer() -> TextTokenizer:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 3, "the": 5}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return TextTokenizer({"tokenizer.json": tokenizer.to_str().encode()}, source="decoder")


def test_texts_are_repeated_for_a_step_that_is_longer(tmp_path: Path) -> None:
    tokenizer = two_word_tokenizer()
    text = tokenizer.encode("\n\n".join(TEXTS)).tolist()
    width = 2 * len(text) + 1
    shapes = {"ids": (1, width), "mask": (1, width)}
    spec = tiny_decoder.interface(capacity=None)
    profile = derive_profile(spec)
    profile = msgspec.structs.replace(profile, min=profile.min | shapes, opt=profile.opt | shapes, max=profile.max | shapes)
    calibration = calibration_samples(
        spec, profile, data=None, graph=tiny_decoder.write(tmp_path / "m.onnx"), seed=0, tokenizer=tokenizer
    )
    assert calibration.origin == "texts"
    assert next(iter(calibration.samples))["ids"].tolist() == [text + text + text[:1]]


def test_a_decoder_with_a_tokenizer_decodes_the_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("ryzen_compile.builder.calibration_samples.synthesize")  # no states are drawn
    graph = tiny_decoder.write(tmp_path / "decoder.onnx")
    spec = interface_of(load(graph))
    calibration = calibration_samples(
        spec,
        derive_profile(spec),
        data=None,
        graph=graph,
        seed=0,
        tokenizer=two_word_tokenizer(),
    )
    assert calibration.origin == "texts"
    steps = list(calibration.samples)
    assert {int(token) for step in steps for token in step["ids"].flat} == {3, 5}
    assert [step["seen"].tolist() for step in steps[:2]] == [[0], [tiny_decoder.MAX_STEP_TOKENS]]


def test_real_samples_are_no_reason_for_a_warning(tmp_path: Path) -> None:
    source = save_language_model(tmp_path / "lm.onnx")
    np.savez(tmp_path / "ids.npz", ids=np.arange(0, 100, 7)[:, None])
    progress = RecordingProgress()
    rc.build(source, gpu="sm89", precision="fp16", data=str(tmp_path / "ids.npz"), cache=False, progress=progress)
    assert [diagnostic.code for diagnostic in progress.diagnostics if diagnostic.severity == "warning"] == []
