"""Every score of kv-evict, also of installed packages, is held by the same tests; no test names a score."""

from __future__ import annotations

import functools
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from msgspec import structs
from support.decoders import VOCABULARY, cached_steps, export, module
from support.doc_pages import ROOT
from support.external_packages import ACME, environment, run_program
from support.scored_decoders import evict_by, statistics_file
from support.step_runner import StepRunner

from ryzen_compile import registry
from ryzen_compile.cli.main import run
from ryzen_compile.errors import ModelError, UsageError
from ryzen_compile.ir.load import load
from ryzen_compile.pipeline.parser import parse
from ryzen_compile.spec.kv_cache import KVCacheSpec, read_kv_cache_spec
from ryzen_compile.spec.passes import Change, PassContext, Refusal
from ryzen_passes.kv.evict import KvEvict
from ryzen_passes.kv.scoring import TorchScorer, find_scorer
from ryzen_passes.kv.scoring.statistics import read_statistics
from ryzen_passes.kv.static import KvStatic

Array = np.ndarray[Any, Any]
SCORES = registry.names("kv_scores")
CALIBRATED = [score for score in SCORES if find_scorer(score).is_calibrated()]
TOKENS, BUDGET, BATCH = 60, 16, 2
HEADS, HEAD_SIZE, WIDTH = 2, 16, 64
"""KV heads, elements per head, and width of the hidden state of the tiny Llama."""
every_score = pytest.mark.parametrize("score", SCORES)


@every_score
def test_the_declaration_is_complete(score: str) -> None:
    scorer = find_scorer(score)
    assert scorer.name == score
    assert not inspect.isabstract(scorer)
    assert scorer.description.startswith("keeps ")
    assert registry.summary("kv_scores", score).startswith(f"{score}: ")
    doc = inspect.getdoc(scorer) or ""
    assert doc.startswith("Score"), "the docstring begins with the formula"
    assert set(re.findall(r"arXiv\s+([\d.]+\d)", scorer.paper)) <= set(re.findall(r"arXiv\s+([\d.]+\d)", doc))
    assert issubclass(scorer.torch_form, TorchScorer)
    assert not inspect.isabstract(scorer.torch_form)


@functools.cache
def evicting(score: str, step: int, interval: int) -> tuple[ir.Model, KVCacheSpec]:
    """Return a tiny Llama that evicts by `score`, and its cache specification."""
    model = load(export("llama", "optimum-sdpa"))
    evict = evict_by(score, budget=str(BUDGET), sinks=2, recent_window=5, rescore_interval=interval)
    for pass_ in (KvStatic(capacity=64, step=step), evict):
        outcome = pass_.rewrite(model, PassContext(backend="onnxruntime"))
        assert isinstance(outcome, Change), outcome
    spec = read_kv_cache_spec(model)
    assert spec is not None
    return model, spec


def distinct_ids(seed: int) -> Array:
    """Return rows of ids without repetition, so that no two tokens have scores that are equal up to rounding."""
    random = np.random.default_rng(seed)
    return np.stack([random.permutation(VOCABULARY)[:TOKENS] for _ in range(BATCH)])


def statistics_files(score: str) -> list[Path]:
    """Return the file with the statistics of `score`, if it is calibrated."""
    return [Path(statistics_file(score, "llama"))] if find_scorer(score).is_calibrated() else []


@pytest.mark.parametrize(
    ("step", "chunks"),
    [(1, [1] * TOKENS), (0, [1] * TOKENS), (0, [7, 1, 20, 1, 1, 9, *[1] * 11, 8, 2]), (0, [TOKENS])],
    ids=["single-token-graph", "single-tokens", "chunks", "one-step"],
)
@every_score
def test_the_onnx_form_equals_the_torch_form(score: str, step: int, chunks: list[int]) -> None:
    """The logits of every step, and position, score, key and value in every slot after the last step."""
    model, spec = evicting(score, step, 3)
    runner, logits, ids = StepRunner(model, BATCH), [], distinct_ids(3)
    for start, chunk in zip(np.cumsum([0, *chunks]), chunks, strict=False):
        logits.append(runner.step(ids[:, start : start + chunk])["logits"])
    decoder = module("llama")
    make_cache = KvEvict.torch_cache_factory(spec, single_token=step == 1, module=decoder, statistics=statistics_files(score))
    assert make_cache is not None
    cache = make_cache()
    np.testing.assert_allclose(np.concatenate(logits, axis=1), cached_steps(decoder, cache, ids, chunks), rtol=0, atol=2e-4)
    names = {state.name: state.input for state in runner.interface.states}
    for index, (layer, cached) in enumerate(zip(spec.layers, cache.layers, strict=True)):
        rows = slice(index * layer.kv_heads, (index + 1) * layer.kv_heads)
        np.testing.assert_array_equal(runner.states[names[layer.policy.position_state]][:, rows], cached.positions)
        np.testing.assert_allclose(runner.states[names[layer.policy.score_state]][:, rows], cached.scores, rtol=1e-4, atol=2e-4)
        np.testing.assert_allclose(runner.states[names[layer.key.state]], cached.keys, rtol=0, atol=1e-4)
        np.testing.assert_allclose(runner.states[names[layer.value.state]], cached.values, rtol=0, atol=1e-4)
    assert {layer.policy.rescore_interval for layer in spec.layers} == {3 if find_scorer(score).time_dependent else 0}


@every_score
def test_kept_tokens_are_those_of_the_highest_scores(score: str) -> None:
    """One step of all tokens scores all of them alike: sinks, recent tokens, and the best of the others are kept."""
    model, spec = evicting(score, 0, 0)
    runner, ids, decoder = StepRunner(model, BATCH), distinct_ids(4), module("llama")
    runner.step(ids)
    replace = structs.replace
    layers = tuple(replace(layer, policy=replace(layer.policy, slots=TOKENS)) for layer in spec.layers)
    unlimited = replace(spec, layers=layers)
    make_cache = KvEvict.torch_cache_factory(unlimited, single_token=False, module=decoder, statistics=statistics_files(score))
    assert make_cache is not None
    cache = make_cache()
    cached_steps(decoder, cache, ids, [TOKENS])
    for index, cached in enumerate(cache.layers):
        for row, head in np.ndindex(BATCH, HEADS):
            scores = cached.scores[row, head].numpy()
            candidates = sorted(range(2, TOKENS - 5), key=lambda token: -scores[token])
            kept = [0, 1, *candidates[: BUDGET - 7], *range(TOKENS - 5, TOKENS)]
            assert sorted(runner.states["past_position"][row, index * HEADS + head].tolist()) == sorted(kept)


def torch_scorer(score: str, hidden_state: torch.Tensor | None) -> TorchScorer:
    """Return the PyTorch form for the first layer of the tiny Llama, which receives `hidden_state` if it reads it."""
    scorer = find_scorer(score)
    statistics = read_statistics(statistics_file(score, "llama")) if scorer.is_calibrated() else None
    tensors = {name: torch.from_numpy(statistics.tensor(0, name)).float() for name in scorer.statistics_names if statistics}
    made = scorer.torch_form(tensors)
    made.hidden_state = hidden_state
    return made


def random_tokens(seed: int, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return keys, values, positions and hidden states of `count` tokens from the position `start`."""
    random = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(BATCH, HEADS, count, HEAD_SIZE, generator=random) for _ in range(2))
    hidden_states = torch.randn(BATCH, count, WIDTH, generator=random)
    return keys, values, torch.arange(start, start + count).expand(BATCH, count), hidden_states


@every_score
def test_only_the_scores_of_time_dependent_scorers_change(score: str) -> None:
    keys, values, positions, hidden_state = random_tokens(1, 0, 8)
    later_keys, later_values, later_positions, later_hidden_state = random_tokens(2, 8, 8)
    scorer = torch_scorer(score, hidden_state)
    first = scorer.score_new_tokens(keys, values, positions)
    scorer.hidden_state = later_hidden_state
    after_others = scorer.score_new_tokens(later_keys, later_values, later_positions)
    alone = torch_scorer(score, later_hidden_state).score_new_tokens(later_keys, later_values, later_positions)
    if find_scorer(score).time_dependent:
        assert (scorer.rescore(keys, 16) - first).abs().max() > 1e-3
        scorer.reset()
        scorer.hidden_state = hidden_state
        torch.testing.assert_close(scorer.score_new_tokens(keys, values, positions), first, rtol=0, atol=0)
    else:
        torch.testing.assert_close(after_others, alone, rtol=0, atol=0)
        with pytest.raises(NotImplementedError):
            scorer.rescore(keys, 16)


@every_score
def test_the_hidden_state_is_read_if_and_only_if_it_is_declared(score: str) -> None:
    keys, values, positions, hidden_state = random_tokens(1, 0, 8)
    scores = torch_scorer(score, hidden_state).score_new_tokens(keys, values, positions)
    others = torch_scorer(score, 2 * hidden_state).score_new_tokens(keys, values, positions)
    assert scores.shape == (BATCH, HEADS, 8)
    assert scores.dtype == torch.float32
    assert find_scorer(score).torch_form.needs_hidden_state == bool((scores != others).any())
    if find_scorer(score).torch_form.needs_hidden_state:
        with pytest.raises(ModelError, match="the input of attention is unknown"):
            torch_scorer(score, None).score_new_tokens(keys, values, positions)


@every_score
def test_padding_changes_no_state_of_a_row_without_tokens(score: str) -> None:
    model, _ = evicting(score, 0, 3)
    runner, ids = StepRunner(model, BATCH), distinct_ids(5)
    runner.step(ids[:, :30])
    before = dict(runner.states)
    runner.step(ids[:, 30:34], np.array([[1, 1, 1, 0], [0, 0, 0, 0]]))
    for name, state in runner.states.items():
        np.testing.assert_array_equal(state[1], before[name][1], err_msg=name)
        assert not np.array_equal(state[0], before[name][0]), name


@every_score
def test_statistics_are_fitted_stored_and_required_as_declared(score: str, tmp_path: Path) -> None:
    scorer, evict = find_scorer(score), KvEvict(score=score, recent_window=5)
    if not scorer.is_calibrated():
        with pytest.raises(UsageError, match=f"the score `{score}` takes no statistics") as caught:
            evict.calibrate(load(export("llama", "optimum-sdpa")), [], tmp_path / "statistics")
        assert caught.value.hint == f"the calibrated scores are {', '.join(CALIBRATED)}"
        return
    statistics = read_statistics(statistics_file(score, "llama"))
    assert (statistics.header.kind, statistics.header.layers) == (score, 2)
    for layer in range(2):
        names = {name.removeprefix(f"{layer}.") for name in statistics.tensors if name.startswith(f"{layer}.")}
        assert set(scorer.statistics_names) <= names
    statistics.write(tmp_path / "statistics")
    again = read_statistics(tmp_path / "statistics")
    assert again.header == statistics.header
    assert again.tensors.keys() == statistics.tensors.keys()
    assert all(np.array_equal(again.tensors[name], statistics.tensors[name]) for name in again.tensors)
    model = load(export("llama", "optimum-sdpa"))
    KvStatic(capacity=64).rewrite(model, PassContext(backend="onnxruntime"))
    outcome = KvEvict(score=score, budget="16", recent_window=5).rewrite(model, PassContext(backend="onnxruntime"))
    assert isinstance(outcome, Refusal)
    assert f"the score `{score}` takes statistics of the model" in outcome.reason
    assert f"--for 'kv-evict{{score={score}}}'" in (outcome.hint or "")


# The values of the option, and where they are listed


@every_score
def test_the_option_takes_the_score(score: str) -> None:
    (pass_,) = parse(f"kv-evict{{score={score}}}")
    assert isinstance(pass_, KvEvict)
    assert pass_.score == score
    assert parse(str(pass_)) == (pass_,)


def test_other_values_of_the_option_are_refused() -> None:
    with pytest.raises(UsageError, match=f"there is no score `{SCORES[0]}x`") as caught:
        parse(f"kv-evict{{score={SCORES[0]}x}}")
    assert caught.value.hint == f"did you mean `{SCORES[0]}`?"
    with pytest.raises(UsageError, match="there is no score `zzz`") as caught:
        parse("kv-evict{score=zzz}")
    assert caught.value.hint == f"available: {', '.join(f'`{score}`' for score in SCORES)}"
    with pytest.raises(UsageError, match="there is no score `zzz`"):
        find_scorer("zzz")


def test_the_pass_lists_the_scores(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["passes", "kv-evict", "--json"]) == 0
    options = {option["name"]: option for option in json.loads(capsys.readouterr().out)["options"]}
    assert list(options["score"]["choices"]) == SCORES
    assert options["budget"]["choices"] is None
    assert run(["passes", "kv-evict"]) == 0
    output = capsys.readouterr().out
    assert f"score: {' | '.join(SCORES)}, default " in output
    assert all(f"\n        {score}: {summary}\n" in output for score, summary in options["score"]["choices"].items())


def test_the_scores_are_listed_and_parsed_without_importing_them() -> None:
    script = (
        "import sys; from ryzen_compile.cli.main import run; from ryzen_compile.pipeline.parser import parse;"
        "run(['passes', 'kv-evict', '--json']); parse('kv-evict{score=%s}');"
        "imported = [name for name in sys.modules if name.startswith('ryzen_passes.kv.sc')];"
        "assert imported == ['ryzen_passes.kv.scorers'], imported; assert 'onnx_ir' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script % SCORES[0]], check=True, stdout=subprocess.DEVNULL)


def test_the_documented_table_is_that_of_the_scores() -> None:
    """On a failure `make tables` writes the page anew."""
    subprocess.run([sys.executable, ROOT / "docs" / "generate_tables.py", "--check"], check=True, cwd=ROOT)


# A score of another package


def test_a_score_of_another_package_is_held_by_the_same_tests(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(Path(__file__)), "-k", "acme-key-max"]
    result = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stdout
    assert "11 passed" in result.stdout


def test_a_score_of_another_package_is_evaluated_against_its_torch_form(tmp_path: Path) -> None:
    """The graph agrees with the form of the score in PyTorch, which is found by the name in the graph's metadata."""
    ids = tmp_path / "ids.npz"
    np.savez(ids, input_ids=np.random.default_rng(5).integers(0, VOCABULARY, (1, 60)))
    passes = "kv-static{capacity=64,step=1},kv-evict{score=acme-key-max,budget=24,sinks=2,recent-window=6}"
    run_program("rewrite", export("llama", "optimum-sdpa"), "one.onnx", "--passes", passes, cwd=tmp_path)
    recipe = tmp_path / "decoder.py"
    recipe.write_text(
        "from support import tiny_decoder_evaluation\n\n\ndef make():\n    return tiny_decoder_evaluation.recipe()\n"
    )
    arguments = ("--baseline", f"{recipe}:make", "--data", ids, "--documents", "1", "--questions", "0", "--continuations", "0")
    result = run_program(
        "evaluate", "one.onnx", *arguments, "--json", cwd=tmp_path, packages=(ACME, ROOT / "tests", ROOT / "benchmarks")
    )
    evaluation = json.loads(result.stdout)
    assert evaluation["method"] == "acme-key-max, 24 tokens per head, in torch"
    metrics = {metric["name"]: metric for metric in evaluation["results"]}
    assert metrics["rewrite-agreement"]["candidate"]["value"] == 1
    assert metrics["rewrite-max-abs"]["candidate"]["value"] < 1e-4
