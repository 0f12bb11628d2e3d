"""Evaluation: every metric against an independent oracle, the record, and rejected inputs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from support import tiny_decoder_evaluation
from support.decoders import VOCABULARY, module
from support.stage_counts import StageCounts

import ryzen_compile as rc
from ryzen_compile.artifacts.package.layout import decode, encode
from ryzen_compile.artifacts.package.manifest import EvaluationRecord, MetricResult
from ryzen_compile.artifacts.package.read import read_package
from ryzen_compile.cli.main import run
from ryzen_compile.errors import RyzenError
from ryzen_compile.ir.load import load as load_graph
from ryzen_compile.ir.save import save
from ryzen_compile.runtime.load import Engine
from ryzen_compile.spec.kv_cache import read_kv_cache_spec, write_kv_cache_spec
from ryzen_compile.spec.recipe import EvaluationData, Task
from ryzen_passes.kv.evict import KvEvict

Array = np.ndarray[Any, Any]
NOTHING = {"documents": 0, "questions": 0, "continuations": 0}


def evaluate_metrics(path: Path, **options: Any) -> dict[str, MetricResult]:
    """Evaluate and return the results over all items, by metric name."""
    result = rc.evaluate(path, baseline=tiny_decoder_evaluation.recipe(), **{**NOTHING, **options})
    return {metric.name: metric for metric in result.results if not metric.group}


def torch_logits(ids: Array, make_cache: Any = None) -> Array:
    """Return the module's logits (tokens, vocabulary) of one row: in one step, or token by token with a cache."""
    model = module("llama")
    with torch.no_grad():
        if make_cache is None:
            return model(torch.from_numpy(ids[None])).logits[0].double().numpy()
        cache, logits = make_cache(), []
        for position, token in enumerate(ids):
            out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True, position_ids=torch.tensor([[position]]))
            logits.append(out.logits[0, 0].double().numpy())
        return np.stack(logits)


def engine_logits(path: Path, ids: Array) -> Array:
    """Return the logits (tokens, vocabulary) of a package for one row."""
    with rc.load(path) as engine, engine.session() as session:
        return np.stack([session.step([[token]])[0, 0] for token in ids.tolist()]).astype(np.float64)


def method_cache_factory(path: Path) -> Any:
    spec = read_kv_cache_spec(load_graph(path))
    assert spec is not None
    return KvEvict.torch_cache_factory(spec, single_token=True)


def test_the_metrics_of_text_match_torch(built: Path) -> None:
    metrics = evaluate_metrics(built / "one.onnx", documents=3, tokens=80)
    documents = [document[:80] for document in tiny_decoder_evaluation.documents(0)]
    assert {len(document) for document in documents} == {70, 80}
    make_cache, loss, kl = method_cache_factory(built / "one.onnx"), dict[str, list[Any]](), dict[str, list[Any]]()
    matches: dict[str, list[Any]] = {}
    rewrite_matches: list[bool] = []
    max_abs = 0.0
    for ids in documents:
        logits = {
            "baseline": torch_logits(ids[:-1]),
            "method": torch_logits(ids[:-1], make_cache),
            "candidate": engine_logits(built / "one.ryzen", ids[:-1]),
        }
        targets, baseline = torch.from_numpy(ids[1:]), torch.from_numpy(logits["baseline"])
        for system, values in logits.items():
            own = torch.from_numpy(values)
            loss.setdefault(system, []).extend(torch.nn.functional.cross_entropy(own, targets, reduction="none").tolist())
            divergence = torch.nn.functional.kl_div(
                own.log_softmax(-1), baseline.log_softmax(-1), reduction="none", log_target=True
            )
            kl.setdefault(system, []).extend(divergence.sum(-1).tolist())
            matches.setdefault(system, []).extend((own.argmax(-1) == baseline.argmax(-1)).tolist())
        rewrite_matches.extend((logits["candidate"].argmax(-1) == logits["method"].argmax(-1)).tolist())
        max_abs = max(max_abs, np.abs(logits["candidate"] - logits["method"]).max())
    for system in ("baseline", "method", "candidate"):
        mean = float(np.mean(loss[system]))
        assert getattr(metrics["perplexity"], system).value == pytest.approx(np.exp(mean), rel=1e-5)
        assert getattr(metrics["bits"], system).value == pytest.approx(np.log2(np.exp(mean)), rel=1e-5)
    for system in ("method", "candidate"):
        extra_loss = np.mean(loss[system]) - np.mean(loss["baseline"])
        assert getattr(metrics["perplexity-ratio"], system).value == pytest.approx(np.exp(extra_loss), rel=1e-5)
        assert getattr(metrics["kl"], system).value == pytest.approx(np.mean(kl[system]), rel=1e-4)
        assert getattr(metrics["agreement"], system).value == pytest.approx(np.mean(matches[system]), abs=1e-9)
    assert metrics["agreement"].candidate.value < 0.95
    assert metrics["rewrite-agreement"].candidate.value == pytest.approx(np.mean(rewrite_matches)) == 1
    assert metrics["rewrite-max-abs"].candidate.value < 1e-4
    assert max_abs < 1e-4
    assert metrics["perplexity"].count == 3
    for metric in metrics.values():
        estimate = metric.candidate
        assert estimate.low is None or estimate.low <= estimate.value <= (estimate.high or 0)


def test_progress_counts_the_steps_of_all_systems(built: Path) -> None:
    progress = StageCounts()
    rc.evaluate(
        built / "one.onnx",
        baseline=f"{SCRIPT}recipe",
        tokens=21,
        questions=3,
        continuations=2,
        prompt_tokens=10,
        new_tokens=15,
        batch_size=2,
        progress=progress,
    )
    (started,) = progress.lines
    lengths = {(len(question.prompt), len(question.answer)) for question in map(tiny_decoder_evaluation.question, range(3))}
    steps = 3 * (2 * 20 + sum(prompt + answer - 1 for prompt, answer in lengths) + (10 + 15 - 1))
    assert started == (
        "evaluates 3 documents of 21 tokens, 3 questions of `recall`, 2 continuations of 15 tokens: "
        f"{steps:,} steps; --quick measures a sample"
    )
    assert progress.texts() == [f"evaluate: {steps} of {steps} steps"]


def test_a_question_is_correct_if_the_greedy_continuation_is_the_answer(built: Path) -> None:
    result = rc.evaluate(
        built / "one.onnx",
        baseline=tiny_decoder_evaluation.recipe(),
        **{**NOTHING, "questions": 30, "seed": 2},
    )
    questions = [tiny_decoder_evaluation.question(2 + index) for index in range(30)]
    with rc.load(built / "one.ryzen") as engine:
        generated = [engine.generate(question.prompt, max_new_tokens=2, chunk=1)[0].tokens for question in questions]
    correct = np.array([np.array_equal(tokens, question.answer) for tokens, question in zip(generated, questions, strict=True)])
    total, *groups = result.results
    assert total.baseline is not None
    assert total.baseline.value == pytest.approx(np.mean([(2 + index) % 4 != 3 for index in range(30)]))
    assert total.method is not None
    assert total.method.value == total.candidate.value == correct.mean()
    assert 0 < correct.mean() < total.baseline.value
    by_group = {metric.group: metric for metric in groups}
    assert sum(metric.count for group, metric in by_group.items() if group.startswith("depth")) == 30
    assert sum(metric.count for group, metric in by_group.items() if group.startswith("distance")) == 30
    near = np.array([question.distance < 64 for question in questions])
    assert by_group["distance 0 to 64"].candidate.value == correct[near].mean() != correct.mean()
    deep = np.array([question.depth == 1 for question in questions])
    deepest = by_group["depth 0.8 to 1.0"]
    assert (deepest.count, deepest.candidate.value) == (deep.sum(), correct[deep].mean())


def test_the_metrics_of_long_generation_use_the_baseline(built: Path) -> None:
    """The candidate generates what `generate` does; greedily, the baseline generates what Transformers does."""
    metrics = evaluate_metrics(built / "one.onnx", continuations=3, prompt_tokens=10, temperature=0.0)
    new_tokens = 8 * tiny_decoder_evaluation.BUDGET
    prompts = [document[:10] for document in tiny_decoder_evaluation.documents(0)]
    with rc.load(built / "one.ryzen") as engine:
        candidate_texts = [result.tokens for result in engine.generate(prompts, max_new_tokens=new_tokens, chunk=1)]
    with torch.no_grad():
        model = module("llama")
        baseline_texts = [
            model.generate(
                torch.from_numpy(prompt[None]),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=None,
            )[0, 10:].numpy()
            for prompt in prompts
        ]
    for system, texts in (("baseline", baseline_texts), ("candidate", candidate_texts)):
        loss, repeated = [], []
        for prompt, text in zip(prompts, texts, strict=True):
            logits = torch_logits(np.concatenate([prompt, text])[:-1])[9:]
            loss.append(torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(text)).item())
            ngrams = [tuple(text[start : start + 8].tolist()) for start in range(new_tokens - 7)]
            repeated.append(sum(ngram in ngrams[:index] for index, ngram in enumerate(ngrams)) / len(ngrams))
        assert getattr(metrics["generated-perplexity"], system).value == pytest.approx(np.exp(np.mean(loss)), rel=1e-4)
        assert getattr(metrics["repetition"], system).value == pytest.approx(np.mean(repeated))
    prefixes = [
        next((at for at in range(new_tokens) if text[at] != reference[at]), new_tokens) / new_tokens
        for text, reference in zip(candidate_texts, baseline_texts, strict=True)
    ]
    assert metrics["matching-prefix"].candidate.value == pytest.approx(np.mean(prefixes))
    assert metrics["matching-prefix"].candidate.value < 0.5
    assert metrics["rewrite-matching-prefix"].candidate.value == 1


def test_sampled_text_is_the_same_as_that_of_generate(built: Path) -> None:
    metrics = evaluate_metrics(built / "one.onnx", continuations=3, prompt_tokens=10, temperature=0.9, new_tokens=40, seed=5)
    prompts = [document[:10] for document in tiny_decoder_evaluation.documents(5)]
    with rc.load(built / "one.ryzen") as engine:
        results = engine.generate(prompts, max_new_tokens=40, temperature=0.9, seed=5, chunk=1)
    loss = [
        torch.nn.functional.cross_entropy(
            torch.from_numpy(torch_logits(np.concatenate([prompt, result.tokens])[:-1])[9:]), torch.from_numpy(result.tokens)
        ).item()
        for prompt, result in zip(prompts, results, strict=True)
    ]
    assert metrics["generated-perplexity"].candidate.value == pytest.approx(np.exp(np.mean(loss)), rel=1e-4)


def test_documents_and_prompts_can_be_fed_in_chunks(built: Path) -> None:
    single, chunked = (
        evaluate_metrics(
            built / "any.onnx", documents=3, questions=6, continuations=2, prompt_tokens=30, new_tokens=60, chunk_size=chunk
        )
        for chunk in (1, 16)
    )
    for metrics in (single, chunked):
        assert metrics["rewrite-agreement"].candidate.value == 1
        assert metrics["rewrite-max-abs"].candidate.value < 1e-4
        assert metrics["rewrite-matching-prefix"].candidate.value == 1
    assert single["perplexity"].baseline == pytest.approx(chunked["perplexity"].baseline)
    assert single["kl"].candidate.value > chunked["kl"].candidate.value > 0.01


def test_a_package_with_several_step_sizes_uses_the_matching_graph(tmp_path: Path) -> None:
    """Chunks run on the graph for any size, single tokens on the graph for one token; the torch reference does the same."""
    from support.decoders import export

    folder, source = tmp_path / "both", str(export("llama", "optimum-sdpa"))
    passes = tiny_decoder_evaluation.passes(0, "position").replace(",step=0", "")
    assert run(["rewrite", source, str(folder), "--passes", passes, "--steps", "1,any"]) == 0
    package = rc.build(folder, output=tmp_path / "both.ryzen", gpu="cpu", compare=False, cache=False).path
    metrics = evaluate_metrics(package, documents=2, tokens=60, chunk_size=16)
    assert metrics["rewrite-agreement"].candidate.value == 1
    assert metrics["rewrite-max-abs"].candidate.value < 1e-4
    assert metrics["kl"].candidate.value > 0.01
    assert sum(len(variant.evaluations) for graph in read_package(package).manifest.graphs for variant in graph.variants) == 1


def test_quantized_caches_are_lossy(tmp_path: Path) -> None:
    from support.decoders import export

    path = tmp_path / "codes.onnx"
    passes = "kv-static{capacity=64,step=1},kv-quant{keys=8,values=8}"
    assert run(["rewrite", str(export("llama", "optimum-sdpa")), str(path), "--passes", passes]) == 0
    result = rc.evaluate(path, baseline=tiny_decoder_evaluation.recipe(), **{**NOTHING, "documents": 1, "tokens": 30})
    assert result.method == "keys as 8; values as 8, in torch"
    assert result.results[0].method is not None


def test_the_torch_reference_of_a_calibrated_score_uses_its_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the statistics are missing, the report says so and the candidate is compared with the baseline."""
    from support.decoders import export

    monkeypatch.chdir(tmp_path)
    source = str(export("llama", "optimum-sdpa"))
    np.savez("ids.npz", input_ids=np.random.default_rng(5).integers(0, VOCABULARY, (12, 60)))
    assert run(["calibrate", source, "zap", "--for", "kv-evict{score=kvzap,recent-window=6}", "--data", "ids.npz", "-q"]) == 0
    passes = tiny_decoder_evaluation.passes(1, "kvzap").removesuffix("}") + ",pyramid=1.5,statistics=zap}"
    assert run(["rewrite", source, "one.onnx", "--passes", passes]) == 0
    amounts = {**NOTHING, "documents": 3}
    present = rc.evaluate("one.onnx", baseline=tiny_decoder_evaluation.recipe(), **amounts)
    Path("moved").mkdir()
    Path("zap").rename("moved/fit")
    moved = rc.evaluate("one.onnx", baseline=tiny_decoder_evaluation.recipe(), statistics="moved/fit", **amounts)
    missing = rc.evaluate("one.onnx", baseline=tiny_decoder_evaluation.recipe(), **amounts)
    metrics = {metric.name: metric for metric in present.results}
    assert present.method == moved.method == "kvzap, 16 to 32 tokens per head, in torch"
    assert metrics["rewrite-agreement"].candidate.value == 1
    assert metrics["rewrite-max-abs"].candidate.value < 1e-4
    assert metrics["kl"].method is not None
    assert metrics["kl"].method.value > 0.01
    assert missing.method.startswith("none: the statistics `zap` (sha256 ")
    assert "that the graph was rewritten with are not found" in missing.method
    assert all(metric.method is None for metric in missing.results)


def test_the_record_contains_no_folder_of_this_machine(tmp_path: Path) -> None:
    from support.decoders import export

    source, ids, statistics, model = (tmp_path / name for name in ("source.onnx", "ids.npz", "zap", "one.onnx"))
    shutil.copy(export("llama", "optimum-sdpa"), source)
    np.savez(ids, input_ids=np.random.default_rng(5).integers(0, VOCABULARY, (12, 60)))
    pass_spec = "kv-evict{score=kvzap,recent-window=6}"
    assert run(["calibrate", str(source), str(statistics), "--for", pass_spec, "--data", str(ids), "-q"]) == 0
    passes = tiny_decoder_evaluation.passes(1, "kvzap").removesuffix("}") + f",statistics={json.dumps(str(statistics))}}}"
    assert run(["rewrite", str(source), str(model), "--passes", passes]) == 0
    assert str(tmp_path).encode() not in model.read_bytes()
    statistics.unlink()
    script = tmp_path / "script.py"
    script.write_text("from support.decoders import module\n\ndef make():\n    return module('llama')\n")
    amounts = {**NOTHING, "documents": 2}
    record = rc.evaluate(model, baseline=f"{script}:make", data=str(ids), **amounts)
    assert record.baseline == "script.py:make, by PyTorch"
    assert record.data.startswith("ids.npz, seed 0: ")
    assert record.method.startswith("none: the statistics `zap` (sha256 ")
    assert str(tmp_path) not in msgspec.json.encode(record).decode()


def test_a_wrong_rewrite_shows_in_the_rewrite_metrics(built: Path, tmp_path: Path) -> None:
    """The graph protects fewer recent tokens than its metadata declares."""
    model = load_graph(built / "one.onnx")
    spec = read_kv_cache_spec(model)
    assert spec is not None
    replace = msgspec.structs.replace
    layers = tuple(
        replace(layer, policy=replace(layer.policy, recent_window=layer.policy.recent_window + 3)) for layer in spec.layers
    )
    write_kv_cache_spec(model, msgspec.structs.replace(spec, layers=layers))
    save(model, tmp_path / "wrong.onnx")
    correct, wrong = (evaluate_metrics(path, documents=2) for path in (built / "one.onnx", tmp_path / "wrong.onnx"))
    assert correct["rewrite-agreement"].candidate.value == 1
    assert wrong["rewrite-agreement"].candidate.value < 0.9
    assert wrong["rewrite-max-abs"].candidate.value > 0.1


def test_a_decoder_with_lossless_caches_is_compared_with_the_baseline(built: Path, tmp_path: Path) -> None:
    from support.decoders import export

    path = tmp_path / "all.onnx"
    assert run(["rewrite", str(export("llama", "optimum-sdpa")), str(path), "--passes", "kv-static{capacity=100}"]) == 0
    result = rc.evaluate(path, baseline=tiny_decoder_evaluation.recipe(), **{**NOTHING, "documents": 2})
    metrics = {metric.name: metric for metric in result.results}
    assert "the caches are lossless" in result.method
    assert all(metric.method is None for metric in result.results)
    assert metrics["rewrite-max-abs"].candidate.value < 1e-4
    assert metrics["perplexity-ratio"].candidate.value == pytest.approx(1, abs=1e-5)


OPTIONS = ["--tokens", "40", "--questions", "4", "--continuations", "0", "-q"]
SCRIPT = f"{Path(tiny_decoder_evaluation.__file__)}:"


def test_the_result_is_recorded_for_the_variant_that_is_named(built: Path, tmp_path: Path) -> None:
    build = rc.build(built / "one.onnx", tmp_path / "two.ryzen", gpu="cpu", passes=["none", "fold"], compare=False, cache=False)
    arguments = ["--baseline", SCRIPT + "recipe", *OPTIONS]
    assert run(["evaluate", f"{build.path}@fold", *arguments]) == 0
    assert run(["evaluate", str(build.path), "--variant", "fold", *arguments]) == 0
    (graph,) = read_package(build.path).manifest.graphs
    assert {variant.name: len(variant.evaluations) for variant in graph.variants} == {"source": 0, "fold": 2}
    assert "graphs/model.fold.onnx" in graph.variants[1].evaluations[0].candidate


def test_the_command_records_the_result_and_exits_by_the_criteria(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = str(shutil.copytree(built / "one.ryzen", tmp_path / "one.ryzen"))
    arguments = ["evaluate", package, "--baseline", SCRIPT + "recipe", *OPTIONS]
    assert run([*arguments, "--require", "kl<=1e-9", "--require", "perplexity<=100x"]) == 1
    assert run([*arguments, "--require", "rewrite-max-abs<=1e-3", "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    (started,) = output.pop("diagnostics")
    assert (started["code"], started["severity"]) == ("evaluation-started", "info")
    assert started["message"] == (
        "evaluates 3 documents of 40 tokens, 4 questions of `recall`: 303 steps; --quick measures a sample"
    )
    printed = msgspec.convert(output, EvaluationRecord)
    manifest = read_package(package).manifest
    first, second = manifest.graphs[0].variants[0].evaluations
    assert (first.met, second) == (False, printed)
    by_name = {metric.name: metric for metric in first.results if not metric.group}
    assert (by_name["kl"].required, by_name["kl"].met) == ("<= 1e-09", False)
    assert (by_name["perplexity"].required, by_name["perplexity"].met) == ("<= 100x", True)
    assert "3 documents" in second.data
    assert run(["inspect", package, "--check"]) == 0
    page = capsys.readouterr().out
    for line in (
        "NOT MET: kl <= 1e-09",
        "torch, same method",
        "rewrite-max-abs",
        "depth 0.0 to 0.2",
        "value-norm, 24 tokens per head",
    ):
        assert line in page
    with rc.load(package) as engine:
        assert isinstance(engine, Engine)


def test_a_manifest_without_evaluations_is_read(built: Path) -> None:
    data = json.loads(encode(read_package(built / "one.ryzen").manifest))
    for variant in data["graphs"][0]["variants"]:
        del variant["evaluations"]
    assert decode(json.dumps(data).encode(), "manifest.json") == read_package(built / "one.ryzen").manifest


def test_documents_are_read_from_files(built: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, 50))
    np.savez(tmp_path / "ids.npz", input_ids=ids)
    amounts = {**NOTHING, "documents": 2}
    result = rc.evaluate(
        built / "one.onnx",
        baseline=tiny_decoder_evaluation.recipe_without_evaluation(),
        data=str(tmp_path / "ids.npz"),
        **amounts,
    )
    loss = [
        torch.nn.functional.cross_entropy(torch.from_numpy(torch_logits(row[:-1])), torch.from_numpy(row[1:])) for row in ids
    ]
    assert result.results[0].baseline is not None
    assert result.results[0].baseline.value == pytest.approx(float(np.exp(np.mean(loss))), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nothing.onnx", "--baseline", "recipe"], 1, "no package or model `nothing.onnx`"),
        (["one.onnx", "--baseline", "recipe_without_evaluation"], 2, "has no evaluation data"),
        (["one.onnx", "--baseline", "recipe_without_cache"], 1, "neither is nor contains a Transformers causal language model"),
        (["one.onnx", "--baseline", "recipe", "--chunk", "4"], 2, "a step of 4 tokens does not fit"),
        (["one.onnx", "--baseline", "recipe", "--require", "kl"], 2, "`kl` is not a requirement"),
        (["one.onnx", "--baseline", "recipe", "--require", "needle>=1"], 2, "`needle` is not measured here"),
        (["one.onnx", "--baseline", "recipe", "--tokens", "5000"], 1, "feeds 4999 tokens"),
        (["one.onnx", "--baseline", "recipe", "--prompt", "80"], 1, "fewer than the 80 tokens of a prompt"),
        (["one.onnx", "--baseline", "recipe", "--data", "wrong.npz"], 1, "input_ids"),
        (["grown.onnx", "--baseline", "recipe"], 1, "is not a decoder with fixed-size states"),
        (
            ["one.onnx", "--baseline", "recipe", "--documents", "0", "--questions", "0", "--continuations", "0"],
            2,
            "nothing to measure",
        ),
    ],
)
def test_invalid_arguments_are_rejected_with_one_message(
    built: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    from support.decoders import export

    shutil.copy(built / "one.onnx", tmp_path)
    shutil.copy(export("llama", "optimum-sdpa"), tmp_path / "grown.onnx")
    np.savez(tmp_path / "wrong.npz", input_ids=np.full((2, 9), VOCABULARY))
    monkeypatch.chdir(tmp_path)
    index = arguments.index("--baseline") + 1
    arguments = [*arguments[:index], SCRIPT + arguments[index], *arguments[index + 1 :]]
    assert run(["evaluate", *arguments]) == code
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": np.array([], np.int64)}, "0 answer ids"),
        ({"depth": 1.5}, "depth 1.5"),
        ({"prompt": np.array([3, VOCABULARY])}, f"got 3..{VOCABULARY}"),
        ({"prompt": np.array([0.5])}, "must be a 1-D array of integer ids"),
        ({"prompt": np.zeros(2000, np.int64)}, "feeds 2001 tokens"),
    ],
)
def test_invalid_questions_are_rejected(built: Path, change: dict[str, Any], message: str) -> None:
    task = Task(
        name="recall", description="", make_question=lambda seed: replace(tiny_decoder_evaluation.question(seed), **change)
    )
    recipe = replace(
        tiny_decoder_evaluation.recipe(), evaluation=EvaluationData(documents=tiny_decoder_evaluation.documents, tasks=(task,))
    )
    with pytest.raises(RyzenError, match=message):
        rc.evaluate(built / "one.onnx", baseline=recipe, **{**NOTHING, "questions": 2})


def test_the_recipe_of_another_model_is_rejected(built: Path, tmp_path: Path) -> None:
    model = load_graph(built / "one.onnx")
    spec = read_kv_cache_spec(model)
    assert spec is not None
    write_kv_cache_spec(model, msgspec.structs.replace(spec, layers=spec.layers[:1]))
    save(model, tmp_path / "fewer.onnx")
    with pytest.raises(RyzenError, match="has 2 layers, the candidate has 1"):
        rc.evaluate(tmp_path / "fewer.onnx", baseline=tiny_decoder_evaluation.recipe())
