"""Evaluate: every measure against an oracle that shares no code with it, what is recorded, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from support import tiny_decoder_evaluation
from support.decoders import VOCABULARY, module

import ryzen_compile as rc
from ryzen_compile.artifacts.package.layout import decode, encode
from ryzen_compile.artifacts.package.manifest import EvaluationRecord, MetricResult
from ryzen_compile.artifacts.package.read import read_package
from ryzen_compile.cli.main import run
from ryzen_compile.errors import RyzenError
from ryzen_compile.evaluation.evaluate import EvalConfig
from ryzen_compile.ir.load import load as load_graph
from ryzen_compile.runtime.load import Engine
from ryzen_compile.spec.kv_cache import METADATA_KEY, KVCacheSpec, read_kv_cache_spec
from ryzen_compile.spec.recipe import EvaluationData, Task
from ryzen_passes.kv.evict import KvEvict

Array = np.ndarray[Any, Any]
NOTHING = {"documents": 0, "questions": 0, "continuations": 0}


def evaluated(path: Path, **amounts: Any) -> dict[str, MetricResult]:
    """Return the whole measures by name."""
    result = rc.evaluate(path, baseline=tiny_decoder_evaluation.recipe(), config=EvalConfig(**{**NOTHING, **amounts}))
    return {one.name: one for one in result.results if not one.group}


def torch_logits(ids: Array, make: Any = None) -> Array:
    """Return the module's logits (tokens, vocabulary) of one row: at once, or token by token with a cache that `make` makes."""
    model = module("llama")
    with torch.no_grad():
        if make is None:
            return model(torch.from_numpy(ids[None])).logits[0].double().numpy()
        cache, found = make(), []
        for at, token in enumerate(ids):
            out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True, position_ids=torch.tensor([[at]]))
            found.append(out.logits[0, 0].double().numpy())
        return np.stack(found)


def engine_logits(path: Path, ids: Array) -> Array:
    """Return the same of a package, one row alone."""
    with rc.load(path) as engine, engine.session() as session:
        return np.stack([session.step([[token]])[0, 0] for token in ids.tolist()]).astype(np.float64)


def method(path: Path) -> Any:
    told = read_kv_cache_spec(load_graph(path))
    assert told is not None
    return KvEvict.torch_reference(told, single_token=True)


def test_text_is_measured_as_torch_measures_it(built: Path) -> None:
    found = evaluated(built / "one.onnx", documents=3, tokens=80)
    documents = [one[:80] for one in tiny_decoder_evaluation.streams(0)]
    assert {len(one) for one in documents} == {70, 80}
    make, loss, kl, agreed, farthest = method(built / "one.onnx"), dict[str, list[Any]](), dict[str, list[Any]](), [], 0.0
    same: dict[str, list[Any]] = {}
    for ids in documents:
        logits = {
            "baseline": torch_logits(ids[:-1]),
            "method": torch_logits(ids[:-1], make),
            "candidate": engine_logits(built / "one.ryzen", ids[:-1]),
        }
        truth, full = torch.from_numpy(ids[1:]), torch.from_numpy(logits["baseline"])
        for column, one in logits.items():
            here = torch.from_numpy(one)
            loss.setdefault(column, []).extend(torch.nn.functional.cross_entropy(here, truth, reduction="none").tolist())
            apart = torch.nn.functional.kl_div(here.log_softmax(-1), full.log_softmax(-1), reduction="none", log_target=True)
            kl.setdefault(column, []).extend(apart.sum(-1).tolist())
            same.setdefault(column, []).extend((here.argmax(-1) == full.argmax(-1)).tolist())
        agreed.extend((logits["candidate"].argmax(-1) == logits["method"].argmax(-1)).tolist())
        farthest = max(farthest, np.abs(logits["candidate"] - logits["method"]).max())
    for column in ("baseline", "method", "candidate"):
        mean = float(np.mean(loss[column]))
        assert getattr(found["perplexity"], column).value == pytest.approx(np.exp(mean), rel=1e-5)
        assert getattr(found["bits"], column).value == pytest.approx(np.log2(np.exp(mean)), rel=1e-5)
    for column in ("method", "candidate"):
        more = np.mean(loss[column]) - np.mean(loss["baseline"])
        assert getattr(found["perplexity-ratio"], column).value == pytest.approx(np.exp(more), rel=1e-5)
        assert getattr(found["kl"], column).value == pytest.approx(np.mean(kl[column]), rel=1e-4)
        assert getattr(found["agreement"], column).value == pytest.approx(np.mean(same[column]), abs=1e-9)
    assert found["agreement"].candidate.value < 0.95
    assert found["rewrite-agreement"].candidate.value == pytest.approx(np.mean(agreed)) == 1
    assert found["rewrite-max-abs"].candidate.value < 1e-4
    assert farthest < 1e-4
    assert found["perplexity"].count == 3
    for one in found.values():
        assert one.candidate.low is None or one.candidate.low <= one.candidate.value <= (one.candidate.high or 0)


def test_questions_are_right_where_a_greedy_continuation_is_the_answer(built: Path) -> None:
    result = rc.evaluate(
        built / "one.onnx",
        baseline=tiny_decoder_evaluation.recipe(),
        config=EvalConfig(**{**NOTHING, "questions": 30, "seed": 2}),
    )
    questions = [tiny_decoder_evaluation.question(2 + nth) for nth in range(30)]
    with rc.load(built / "one.ryzen") as engine:
        went_on = [engine.generate(one.prompt, max_new_tokens=2, chunk=1)[0].tokens for one in questions]
    right = np.array([np.array_equal(tokens, one.answer) for tokens, one in zip(went_on, questions, strict=True)])
    whole, *parts = result.results
    assert whole.baseline is not None
    assert whole.baseline.value == pytest.approx(np.mean([(2 + nth) % 4 != 3 for nth in range(30)]))
    assert whole.method is not None
    assert whole.method.value == whole.candidate.value == right.mean()
    assert 0 < right.mean() < whole.baseline.value
    by_part = {one.group: one for one in parts}
    assert sum(one.count for part, one in by_part.items() if part.startswith("depth")) == 30
    assert sum(one.count for part, one in by_part.items() if part.startswith("distance")) == 30
    near = np.array([one.distance < 64 for one in questions])
    assert by_part["distance 0 to 64"].candidate.value == right[near].mean() != right.mean()
    deep = np.array([one.depth == 1 for one in questions])
    last = by_part["depth 0.8 to 1.0"]
    assert (last.count, last.candidate.value) == (deep.sum(), right[deep].mean())


def test_long_generation_is_judged_by_the_baseline(built: Path) -> None:
    """What the subject writes is what `generate` writes; greedily, what the baseline writes is what transformers writes."""
    found = evaluated(built / "one.onnx", continuations=3, prompt=10, temperature=0.0)
    new = 8 * tiny_decoder_evaluation.BUDGET
    prompts = [one[:10] for one in tiny_decoder_evaluation.streams(0)]
    with rc.load(built / "one.ryzen") as engine:
        mine = [one.tokens for one in engine.generate(prompts, max_new_tokens=new, chunk=1)]
    with torch.no_grad():
        model = module("llama")
        theirs = [
            model.generate(
                torch.from_numpy(one[None]), max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None
            )[0, 10:].numpy()
            for one in prompts
        ]
    for column, texts in (("baseline", theirs), ("candidate", mine)):
        loss, repeated = [], []
        for prompt, text in zip(prompts, texts, strict=True):
            logits = torch_logits(np.concatenate([prompt, text])[:-1])[9:]
            loss.append(torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(text)).item())
            runs = [tuple(text[at : at + 8].tolist()) for at in range(new - 7)]
            repeated.append(sum(one in runs[:at] for at, one in enumerate(runs)) / len(runs))
        assert getattr(found["generated-perplexity"], column).value == pytest.approx(np.exp(np.mean(loss)), rel=1e-4)
        assert getattr(found["repetition"], column).value == pytest.approx(np.mean(repeated))
    stays = [next((at for at in range(new) if a[at] != b[at]), new) / new for a, b in zip(mine, theirs, strict=True)]
    assert found["stays"].candidate.value == pytest.approx(np.mean(stays))
    assert found["stays"].candidate.value < 0.5
    assert found["rewrite-stays"].candidate.value == 1


def test_sampled_text_is_that_of_generate(built: Path) -> None:
    found = evaluated(built / "one.onnx", continuations=3, prompt=10, temperature=0.9, new_tokens=40, seed=5)
    prompts = [one[:10] for one in tiny_decoder_evaluation.streams(5)]
    with rc.load(built / "one.ryzen") as engine:
        mine = engine.generate(prompts, max_new_tokens=40, temperature=0.9, seed=5, chunk=1)
    loss = [
        torch.nn.functional.cross_entropy(
            torch.from_numpy(torch_logits(np.concatenate([prompt, one.tokens])[:-1])[9:]), torch.from_numpy(one.tokens)
        ).item()
        for prompt, one in zip(prompts, mine, strict=True)
    ]
    assert found["generated-perplexity"].candidate.value == pytest.approx(np.exp(np.mean(loss)), rel=1e-4)


def test_chunks_are_fed_to_graphs_that_take_them(built: Path) -> None:
    ones, chunks = (
        evaluated(built / "any.onnx", documents=3, questions=6, continuations=2, prompt=30, new_tokens=60, chunk=chunk)
        for chunk in (1, 16)
    )
    for found in (ones, chunks):
        assert found["rewrite-agreement"].candidate.value == 1
        assert found["rewrite-max-abs"].candidate.value < 1e-4
        assert found["rewrite-stays"].candidate.value == 1
    assert ones["perplexity"].baseline == pytest.approx(chunks["perplexity"].baseline)
    assert ones["kl"].candidate.value > chunks["kl"].candidate.value > 0.01


def test_a_package_of_several_widths_is_fed_by_the_graph_that_suits(tmp_path: Path) -> None:
    """Prompts in chunks, single steps by the graph of single steps: torch does the same, and each graph alone does not."""
    from support.decoders import export

    folder, source = tmp_path / "both", str(export("llama", "optimum-sdpa"))
    passes = tiny_decoder_evaluation.passes(0, "position").replace(",step=0", "")
    assert run(["rewrite", source, str(folder), "--passes", passes, "--steps", "1,any"]) == 0
    package = rc.build(folder, output=tmp_path / "both.ryzen", gpu="cpu", compare=False, cache=False).path
    found = evaluated(package, documents=2, tokens=60, chunk=16)
    assert found["rewrite-agreement"].candidate.value == 1
    assert found["rewrite-max-abs"].candidate.value < 1e-4
    assert found["kl"].candidate.value > 0.01
    assert sum(len(variant.evaluations) for graph in read_package(package).manifest.graphs for variant in graph.variants) == 1


def test_codes_are_no_caches_that_lose_nothing(tmp_path: Path) -> None:
    from support.decoders import export

    path = tmp_path / "codes.onnx"
    passes = "kv-static{capacity=64,step=1},kv-quant{keys=8,values=8}"
    assert run(["rewrite", str(export("llama", "optimum-sdpa")), str(path), "--passes", passes]) == 0
    result = rc.evaluate(
        path, baseline=tiny_decoder_evaluation.recipe(), config=EvalConfig(**{**NOTHING, "documents": 1, "tokens": 30})
    )
    assert result.method == "keys as 8; values as 8, in torch"
    assert result.results[0].method is not None


def test_calibrated_scores_are_told_by_their_statistics_in_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where these are gone the report says so, and the rewrite is held to the baseline."""
    from support.decoders import export

    monkeypatch.chdir(tmp_path)
    source = str(export("llama", "optimum-sdpa"))
    np.savez("ids.npz", input_ids=np.random.default_rng(5).integers(0, VOCABULARY, (12, 60)))
    assert run(["calibrate", source, "zap", "--for", "kv-evict{score=kvzap,recent-window=6}", "--data", "ids.npz", "-q"]) == 0
    passes = tiny_decoder_evaluation.passes(1, "kvzap").removesuffix("}") + ",pyramid=1.5,statistics=zap}"
    assert run(["rewrite", source, "one.onnx", "--passes", passes]) == 0
    amounts = EvalConfig(**{**NOTHING, "documents": 3})
    there = rc.evaluate("one.onnx", baseline=tiny_decoder_evaluation.recipe(), config=amounts)
    Path("zap").unlink()
    gone = rc.evaluate("one.onnx", baseline=tiny_decoder_evaluation.recipe(), config=amounts)
    found = {one.name: one for one in there.results}
    assert there.method == "kvzap, 16 to 32 tokens a head, in torch"
    assert found["rewrite-agreement"].candidate.value == 1
    assert found["rewrite-max-abs"].candidate.value < 1e-4
    assert found["kl"].method is not None
    assert found["kl"].method.value > 0.01
    assert gone.method.startswith("none: `zap` holds no statistics")
    assert all(one.method is None for one in gone.results)


def test_a_wrong_rewrite_shows_as_that_and_not_as_the_cost_of_the_method(built: Path, tmp_path: Path) -> None:
    """A graph that protects fewer tokens than it says."""
    model = onnx.load(built / "one.onnx")
    (entry,) = (one for one in model.metadata_props if one.key == METADATA_KEY)
    told = msgspec.json.decode(entry.value, type=KVCacheSpec)
    layers = tuple(msgspec.structs.replace(layer, recent_window=layer.recent_window + 3) for layer in told.layers)
    entry.value = msgspec.json.encode(msgspec.structs.replace(told, layers=layers)).decode()
    onnx.save(model, tmp_path / "wrong.onnx")
    right, wrong = (evaluated(path, documents=2) for path in (built / "one.onnx", tmp_path / "wrong.onnx"))
    assert right["rewrite-agreement"].candidate.value == 1
    assert wrong["rewrite-agreement"].candidate.value < 0.9
    assert wrong["rewrite-max-abs"].candidate.value > 0.1


def test_caches_that_keep_all_are_held_to_the_baseline(built: Path, tmp_path: Path) -> None:
    from support.decoders import export

    path = tmp_path / "all.onnx"
    assert run(["rewrite", str(export("llama", "optimum-sdpa")), str(path), "--passes", "kv-static{capacity=100}"]) == 0
    result = rc.evaluate(path, baseline=tiny_decoder_evaluation.recipe(), config=EvalConfig(**{**NOTHING, "documents": 2}))
    found = {one.name: one for one in result.results}
    assert "lose nothing" in result.method
    assert all(one.method is None for one in result.results)
    assert found["rewrite-max-abs"].candidate.value < 1e-4
    assert found["perplexity-ratio"].candidate.value == pytest.approx(1, abs=1e-5)


WORDS = ["--tokens", "40", "--questions", "4", "--continuations", "0", "-q"]
SCRIPT = f"{Path(tiny_decoder_evaluation.__file__)}:"


def test_the_program_records_what_it_found_and_exits_by_the_criteria(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = str(shutil.copytree(built / "one.ryzen", tmp_path / "one.ryzen"))
    words = ["evaluate", package, "--baseline", SCRIPT + "recipe", *WORDS]
    assert run([*words, "--require", "kl<=1e-9", "--require", "perplexity<=100x"]) == 1
    assert run([*words, "--require", "rewrite-max-abs<=1e-3", "--json"]) == 0
    told = msgspec.json.decode(capsys.readouterr().out, type=EvaluationRecord)
    manifest = read_package(package).manifest
    first, second = manifest.graphs[0].variants[0].evaluations
    assert (first.met, second) == (False, told)
    by_name = {one.name: one for one in first.results if not one.group}
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
        "value-norm, 24 tokens a head",
    ):
        assert line in page
    with rc.load(package) as engine:
        assert isinstance(engine, Engine)


def test_packages_from_before_there_were_evaluations_are_read(built: Path) -> None:
    data = json.loads(encode(read_package(built / "one.ryzen").manifest))
    for variant in data["graphs"][0]["variants"]:
        del variant["evaluations"]
    assert decode(json.dumps(data).encode(), "manifest.json") == read_package(built / "one.ryzen").manifest


def test_documents_come_from_files(built: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, 50))
    np.savez(tmp_path / "ids.npz", input_ids=ids)
    amounts = EvalConfig(**{**NOTHING, "documents": 2})
    result = rc.evaluate(
        built / "one.onnx",
        baseline=tiny_decoder_evaluation.recipe_without_evaluation(),
        data=str(tmp_path / "ids.npz"),
        config=amounts,
    )
    loss = [
        torch.nn.functional.cross_entropy(torch.from_numpy(torch_logits(one[:-1])), torch.from_numpy(one[1:])) for one in ids
    ]
    assert result.results[0].baseline is not None
    assert result.results[0].baseline.value == pytest.approx(float(np.exp(np.mean(loss))), rel=1e-5)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["nothing.onnx", "--baseline", "recipe"], 1, "no package or model `nothing.onnx`"),
        (["one.onnx", "--baseline", "silent"], 2, "brings nothing to evaluate on"),
        (["one.onnx", "--baseline", "other"], 1, "causal language model of transformers"),
        (["one.onnx", "--baseline", "recipe", "--chunk", "4"], 2, "a step of 4 tokens does not fit"),
        (["one.onnx", "--baseline", "recipe", "--require", "kl"], 2, "`kl` is no criterion"),
        (["one.onnx", "--baseline", "recipe", "--require", "needle>=1"], 2, "`needle` is not measured here"),
        (["one.onnx", "--baseline", "recipe", "--tokens", "5000"], 1, "feeds 4999 tokens"),
        (["one.onnx", "--baseline", "recipe", "--prompt", "80"], 1, "fewer than the 80 tokens of a prompt"),
        (["one.onnx", "--baseline", "recipe", "--data", "wrong.npz"], 1, "input_ids"),
        (["grown.onnx", "--baseline", "recipe"], 1, "no decoder of fixed-size states"),
        (["one.onnx", "--baseline", "recipe", "--documents", "0", "--questions", "0", "--continuations", "0"], 2, "nothing"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_message(
    built: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    says: str,
) -> None:
    from support.decoders import export

    shutil.copy(built / "one.onnx", tmp_path)
    shutil.copy(export("llama", "optimum-sdpa"), tmp_path / "grown.onnx")
    np.savez(tmp_path / "wrong.npz", input_ids=np.full((2, 9), VOCABULARY))
    monkeypatch.chdir(tmp_path)
    at = words.index("--baseline") + 1
    assert run(["evaluate", *words[:at], SCRIPT + words[at], *words[at + 1 :]]) == code
    told = capsys.readouterr().err
    assert says in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"answer": np.array([], np.int64)}, "0 ids as answer"),
        ({"depth": 1.5}, "depth 1.5"),
        ({"prompt": np.array([3, VOCABULARY])}, f"got 3..{VOCABULARY}"),
        ({"prompt": np.array([0.5])}, "no row of ids"),
        ({"prompt": np.zeros(2000, np.int64)}, "feeds 2001 tokens"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(built: Path, change: dict[str, Any], says: str) -> None:
    task = Task(
        name="recall", description="", make_question=lambda seed: replace(tiny_decoder_evaluation.question(seed), **change)
    )
    recipe = replace(
        tiny_decoder_evaluation.recipe(), evaluation=EvaluationData(streams=tiny_decoder_evaluation.streams, tasks=(task,))
    )
    with pytest.raises(RyzenError, match=says):
        rc.evaluate(built / "one.onnx", baseline=recipe, config=EvalConfig(**{**NOTHING, "questions": 2}))


def test_another_models_recipe_is_refused(built: Path, tmp_path: Path) -> None:
    model = onnx.load(built / "one.onnx")
    (entry,) = (one for one in model.metadata_props if one.key == METADATA_KEY)
    told = msgspec.json.decode(entry.value, type=KVCacheSpec)
    entry.value = msgspec.json.encode(msgspec.structs.replace(told, layers=told.layers[:1])).decode()
    onnx.save(model, tmp_path / "fewer.onnx")
    with pytest.raises(RyzenError, match="has 2 layers, the subject 1"):
        rc.evaluate(tmp_path / "fewer.onnx", baseline=tiny_decoder_evaluation.recipe())
