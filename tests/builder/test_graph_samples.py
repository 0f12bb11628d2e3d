"""Samples of graphs: token streams become the steps of every step graph of a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny_decoder
from support.decoders import VOCABULARY, export
from support.ort_session import run_as_written

import ryzen_compile as rc
from ryzen_compile.backends.onnxruntime.graph_runs import graph_runs
from ryzen_compile.builder.graph_samples import DecoderSteps, graph_samples, kept_samples
from ryzen_compile.builder.rewrite import RewriteConfig, rewrite_steps
from ryzen_compile.errors import RyzenError, ShapeError
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.spec.interface import Inputs, Interface
from ryzen_compile.spec.profile_request import resolve_profiles

STREAMS = np.random.default_rng(0).integers(0, tiny_decoder.VOCABULARY, (3, 30))


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    return tiny_decoder.write(tmp_path / "decoder.onnx")


def read(data: Path, graph: Path, width: int) -> tuple[Sequence[Inputs], Interface]:
    interface = interface_of(load(graph))
    (profile,) = resolve_profiles(interface, opt_shapes=[f"ids:1x{width}"])
    return graph_samples(str(data), interface, profile, graph, seed=0), interface


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(("width", "steps_per_stream"), [(12, 2), (1, 22), (30, 1)])
def test_the_samples_are_the_steps_over_each_stream(width: int, steps_per_stream: int, decoder: Path, tmp_path: Path) -> None:
    samples, _ = read(save(tmp_path / "ids.npz", ids=STREAMS), decoder, width)
    assert isinstance(samples, DecoderSteps)
    steps = list(samples)
    assert len(samples) == len(steps) == 3 * steps_per_stream
    for stream_index, stream in enumerate(STREAMS):
        expected = tiny_decoder.reference_logits(stream.tolist())
        for step in range(steps_per_stream):
            sample, start = steps[stream_index * steps_per_stream + step], step * width
            np.testing.assert_array_equal(sample["ids"], stream[None, start : start + width])
            assert sample["seen"].tolist() == [start]
            logits = run_as_written(decoder, sample)[0]
            np.testing.assert_allclose(logits[0], expected[start : start + width], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(samples[-1]["ids"], steps[-1]["ids"])


def test_samples_of_every_input_are_used_as_they_are(decoder: Path, tmp_path: Path) -> None:
    steps, interface = read(save(tmp_path / "ids.npz", ids=STREAMS), decoder, 12)
    samples, _ = read(save(tmp_path / "full.npz", **steps[1]), decoder, 12)
    assert isinstance(samples, list)
    assert set(samples[0]) == {spec.name for spec in interface.inputs}


def test_streams_that_are_too_short_or_of_another_name_are_refused(decoder: Path, tmp_path: Path) -> None:
    with pytest.raises(RyzenError, match="no stream of tokens has the 12 tokens of a step of `decoder.onnx`"):
        read(save(tmp_path / "short.npz", ids=STREAMS[:, :5]), decoder, 12)
    with pytest.raises(ShapeError, match="unknown input `tokens`"):
        read(save(tmp_path / "tokens.npz", tokens=STREAMS), decoder, 12)


def test_samples_in_memory_are_bounded(decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, _ = read(save(tmp_path / "ids.npz", ids=STREAMS), decoder, 1)
    assert len(kept_samples(steps)) == len(steps)
    size = sum(array.nbytes for array in steps[0].values())
    monkeypatch.setattr("ryzen_compile.builder.graph_samples.MAX_KEPT_BYTES", 3 * size)
    assert len(kept_samples(steps)) == 3


def test_samples_are_decoded_once_to_be_kept(decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, _ = read(save(tmp_path / "ids.npz", ids=STREAMS), decoder, 12)
    decode, runs = DecoderSteps.__iter__, []
    monkeypatch.setattr(DecoderSteps, "__iter__", lambda self: runs.append(self) or decode(self))
    assert len(kept_samples(steps)) == 6
    assert len(runs) == 1


def test_one_file_of_token_ids_calibrates_and_compares_all_step_graphs(tmp_path: Path) -> None:
    folder = tmp_path / "decode"
    rewrite_steps(export("llama", "optimum-sdpa"), folder, RewriteConfig(passes="kv-static{capacity=64}"), (1, 0))
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (2, 40))
    package = rc.build(
        folder, gpu="cpu,sm89", precision="fp16", data=str(save(tmp_path / "ids.npz", input_ids=ids)), cache=False
    )
    assert {graph.name for graph in package.manifest.graphs} == {"step-1", "step-any"}
    records = {
        graph.name: record
        for graph in package.manifest.graphs
        for variant in graph.variants
        for record in variant.passes
        if record.pass_spec == "precision{to=fp16}"
    }
    assert all("drawn from a seed" not in record.reason and not record.warnings for record in records.values())
    assert "ranges measured on 64 samples" in records["step-1"].reason
    assert all(accuracy.met for graph in package.manifest.graphs for variant in graph.variants for accuracy in variant.accuracy)


def test_a_child_process_makes_the_same_steps(decoder: Path, tmp_path: Path) -> None:
    samples, _ = read(save(tmp_path / "ids.npz", ids=STREAMS), decoder, 12)
    assert isinstance(samples, DecoderSteps)
    with graph_runs(decoder, samples) as runs:
        outputs = [run.outputs() for run in runs]
    assert len(outputs) == len(samples)
    for sample, output in zip(samples, outputs, strict=True):
        np.testing.assert_array_equal(next(iter(output.values())), run_as_written(decoder, sample)[0])
