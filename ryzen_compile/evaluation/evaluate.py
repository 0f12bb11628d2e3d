"""Evaluate: a decoder against its PyTorch baseline, on text, tasks and long generation."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from ryzen_compile.artifacts.package.manifest import EvaluationRecord, Manifest, MetricResult
from ryzen_compile.artifacts.package.write import replace_manifest
from ryzen_compile.errors import ModelError, ShapeError, UsageError
from ryzen_compile.evaluation import generation, perplexity
from ryzen_compile.evaluation.criteria import apply_requirements, check_requirements, parse_requirements
from ryzen_compile.evaluation.documents import documents_from_samples
from ryzen_compile.evaluation.evaluated_decoder import EvaluatedDecoder, open_decoder
from ryzen_compile.evaluation.systems import Systems
from ryzen_compile.evaluation.tasks import measure_task
from ryzen_compile.evaluation.token_decoders import SessionDecoder, TorchDecoder, find_causal_lm
from ryzen_compile.progress import Progress, SilentProgress
from ryzen_compile.runtime.generation.decoder_spec import make_decoder_spec, nearest_size
from ryzen_compile.runtime.generation.sampling import SamplingParams
from ryzen_compile.spec.recipe import EvaluationData, Question, Recipe, Task
from ryzen_compile.torch_module import LoadedModule, load_module, suppress_output
from ryzen_compile.utils.record import utc_now

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]

CONTINUATION_BUDGET_FACTOR = 8
"""Long generation goes on for this many times as many tokens as a head keeps, where the model has positions for it."""
_COMPARISON_METRICS = ("perplexity-ratio", "agreement", "kl", "rewrite-agreement", "rewrite-max-abs", "stays", "rewrite-stays")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How much is measured, and how it is fed. Raises UsageError for numbers out of range."""

    documents: int = 8
    """At least 0; with 0 no text is measured."""
    tokens: int | None = None
    """How many tokens of a document count, at least 2; None: as many as the decoder takes."""
    questions: int = 50
    """Of each task; at least 0."""
    continuations: int = 4
    """At least 0."""
    prompt_tokens: int = 64
    """How many tokens of a document a continuation begins with: at least 1."""
    new_tokens: int | None = None
    """How long a continuation is, at least 1; None: BEYOND times the budget, or as long as the model has positions for."""
    temperature: float = 1.0
    """Of continuations; 0 is greedy."""
    chunk_size: int = 1
    """How many tokens of text and prompts a step feeds, at least 1: 1 is what generating does."""
    batch_size: int = 8
    """How many sequences are run together, at least 1."""
    seed: int = 0
    """Of documents, questions and what continuations draw: at least 0."""

    def __post_init__(self) -> None:
        least = {"documents": 0, "tokens": 2, "questions": 0, "continuations": 0, "prompt": 1, "new_tokens": 1, "chunk": 1}
        for name, low in {**least, "rows": 1, "seed": 0}.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UsageError(f"`{name}` is {value}", hint=f"it must be at least {low}")
        SamplingParams(temperature=self.temperature)


def evaluate(
    candidate: str | os.PathLike[str],
    *,
    baseline: str | Recipe,
    data: str | None = None,
    requirements: Sequence[str] = (),
    config: EvalConfig | None = None,
    graph: str | None = None,
    backend: str | None = None,
    progress: Progress | None = None,
) -> EvaluationRecord:
    """Measure a decoder with caches of fixed size, a package or an ONNX file, against the PyTorch baseline of a recipe.

    There are up to three columns: the baseline, which keeps all; the baseline with the method of the subject's caches, in plain
    torch; and the subject. The second against the first is what the method costs, the third against the second is what is
    wrong with the rewrite. Measured are `text.NAMES` over documents, each task of the recipe, and `generation.NAMES` over long
    continuations; each figure has an interval at 95 %: Wilson's for shares of questions, bootstrapped over documents and
    continuations for all else.

    `baseline` is a recipe or its name, or `file.py:function`; its module is, or holds, a causal language model of transformers.
    Documents and tasks are those of the recipe's `evaluation`; `data` gives other documents, as `--data` takes samples, by the
    name of the input of ids, (documents, tokens). `require` holds criteria as `perplexity<=1.01x`. `graph` and `backend` are as
    in `load`. The result is added to the package's manifest, whether or not the criteria are met.

    Raises UsageError where there is nothing to measure or a criterion cannot be read, ShapeError for documents that do not fit,
    RyzenError where the subject is no such decoder or the baseline cannot be run.
    """
    progress, config = progress or SilentProgress(), config or EvalConfig()
    required, started = parse_requirements(requirements), time.perf_counter()
    with suppress_output():
        loaded = load_module(baseline.removeprefix("recipe:") if isinstance(baseline, str) else baseline)
        model = find_causal_lm(loaded.module, loaded.name)
    brought = loaded.recipe.evaluation if loaded.recipe else None
    with open_decoder(candidate, graph=graph, backend=backend) as found:
        job = _EvaluationRun(found, loaded, model, config, progress)
        evaluation = _select_evaluation(brought, data, found, loaded.name)
        names = ([*perplexity.METRIC_NAMES] if config.documents else []) + (
            [*generation.METRIC_NAMES] if config.continuations else []
        )
        names += [task.name for task in evaluation.tasks] if config.questions else []
        check_requirements(required, metric_names=names, comparison_metrics=_COMPARISON_METRICS)
        findings = apply_requirements(job.run(evaluation), required)
        result = EvaluationRecord(
            candidate=found.engine.choice.summary,
            baseline=f"{loaded.name}, by PyTorch",
            method=job.method_summary,
            machine=found.machine,
            data=_describe_data(data or f"recipe {loaded.name}", evaluation, job),
            step_mode="one token a step" if config.chunk_size == 1 else f"{config.chunk_size} tokens a step",
            results=findings,
            met=all(one.met for one in findings),
            timestamp=utc_now(),
            seconds=time.perf_counter() - started,
            notes=tuple(job.notes),
        )
    if found.package is not None:
        replace_manifest(found.package, _with_evaluation(found.package.manifest, found.variant_path or "", result))
    return result


class _EvaluationRun:
    """One evaluation under way."""

    def __init__(
        self, candidate: EvaluatedDecoder, loaded: LoadedModule, model: torch.nn.Module, config: EvalConfig, progress: Progress
    ) -> None:
        self.candidate, self.loaded, self.model, self.config, self.progress = candidate, loaded, model, config, progress
        self.notes: list[str] = []
        self.document_count = self.continuation_count = 0
        layers = getattr(model.config, "num_hidden_layers", None)
        if layers is not None and layers != len(candidate.cache_spec.layers):
            raise ModelError(
                f"`{loaded.name}` has {layers} layers, the subject {len(candidate.cache_spec.layers)}",
                hint="name the recipe that it was exported from",
            )
        self.max_sequence_length = _max_sequence_length(candidate, model)
        self._make_method_cache = self._method_cache_factory()

    def _method_cache_factory(self) -> Any:
        """Return what makes the caches of the middle column, and say what that is."""
        words = self.candidate.method_summary
        self.method_summary = f"{words}, in torch"
        if words is None:
            self.method_summary = "none: the caches lose nothing, and the rewrite is held to the baseline itself"
            return None
        try:
            make = self.candidate.torch_reference(self.model)
        except ModelError as why:
            self.method_summary = f"none: {why.message}; the rewrite is held to the baseline itself"
            return None
        if make is None:
            self.method_summary = f"none: {words} has no form in torch; the rewrite is held to the baseline itself"
        return make

    def run(self, evaluation: EvaluationData) -> list[MetricResult]:
        """Measure everything."""
        amounts, findings = self.config, list[MetricResult]()
        with self._open_systems() as columns:
            documents = self._load_documents(evaluation)
            if documents:
                with self.progress.stage(f"foretell {len(documents)} documents"):
                    findings += perplexity.measure_perplexity(
                        columns, documents, chunk_size=amounts.chunk_size, seed=amounts.seed
                    )
            for task in evaluation.tasks if amounts.questions else ():
                with self.progress.stage(f"answer {amounts.questions} questions of `{task.name}`"):
                    questions = [self._make_question(task, amounts.seed + nth) for nth in range(amounts.questions)]
                    findings += measure_task(columns, task.name, questions, chunk_size=amounts.chunk_size)
            if amounts.continuations:
                findings += self._measure_generation(columns, evaluation)
        if not findings:
            raise UsageError("nothing was measured", hint="ask for documents, questions or continuations")
        return findings

    @contextmanager
    def _open_systems(self) -> Iterator[Systems]:
        from transformers import DynamicCache

        engine, config = self.candidate.engine, self.model.config
        most = max(self.config.documents, self.config.questions, self.config.continuations, 1)
        rows = min(self.config.batch_size, most)
        batch = nearest_size(rows, make_decoder_spec(engine.interface).batch_ranges(engine.profiles))
        with engine.session(batch) as session:
            subject = SessionDecoder(session, name="the subject")
            subject.check_step_size(self.config.chunk_size)
            subject.check_step_size(1)
            baseline = TorchDecoder(
                self.model, lambda: DynamicCache(config=config), name=f"`{self.loaded.name}`", is_chunk_invariant=True
            )
            method = None
            if self._make_method_cache is not None:
                method = TorchDecoder(
                    self.model, self._make_method_cache, name=f"`{self.loaded.name}` with the method", is_chunk_invariant=False
                )
            yield Systems(baseline=baseline, method=method, candidate=subject, batch_size=min(rows, batch))

    def _load_documents(self, evaluation: EvaluationData) -> list[Array]:
        """Return the beginnings of the documents that count, (tokens,) ids each."""
        amounts = self.config
        wanted = self.max_sequence_length + 1 if self.max_sequence_length is not None else None
        if amounts.tokens is not None:
            self._check_length(amounts.tokens - 1, "a document")
            wanted = amounts.tokens
        found = [self._validate_ids(one)[:wanted] for one in islice(evaluation.streams(amounts.seed), amounts.documents)]
        self.document_count = len(found)
        if amounts.documents and not found:
            raise ShapeError("there is no document", hint="give --data, or --documents 0")
        if any(len(one) < 2 for one in found):
            raise ShapeError("a document holds fewer than 2 tokens: there is nothing to foretell")
        return found

    def _measure_generation(self, systems: Systems, evaluation: EvaluationData) -> list[MetricResult]:
        amounts = self.config
        prompts = [
            self._validate_ids(one)[: amounts.prompt_tokens]
            for one in islice(evaluation.streams(amounts.seed), amounts.continuations)
        ]
        if not prompts or any(len(one) < amounts.prompt_tokens for one in prompts):
            raise ShapeError(
                f"a document holds fewer than the {amounts.prompt_tokens} tokens of a prompt", hint="choose another --prompt"
            )
        self.continuation_count = len(prompts)
        budget = max(layer.slots or 0 for layer in self.candidate.cache_spec.layers)
        room = None if self.max_sequence_length is None else self.max_sequence_length - amounts.prompt_tokens
        new = amounts.new_tokens or min(
            CONTINUATION_BUDGET_FACTOR * budget, room if room is not None else CONTINUATION_BUDGET_FACTOR * budget
        )
        self._check_length(amounts.prompt_tokens + new, "a continuation")
        self.notes.append(
            f"continuations are of {new} tokens behind {amounts.prompt_tokens}, {new / budget:.1f} times the {budget} that a head "
            f"keeps at most, {f'drawn at a temperature of {amounts.temperature:g}' if amounts.temperature else 'greedy'}"
        )
        sampling = SamplingParams(temperature=amounts.temperature)
        with self.progress.stage(f"continue {len(prompts)} documents by {new} tokens"):
            return generation.measure_generation(
                systems, prompts, new_tokens=new, sampling=sampling, chunk_size=amounts.chunk_size, seed=amounts.seed
            )

    def _make_question(self, task: Task, seed: int) -> Question:
        """Return a question that can be asked."""
        where, one = f"a question of `{task.name}`, seed {seed}", task.make_question(seed)
        prompt, answer = self._validate_ids(one.prompt, where), self._validate_ids(one.answer, where)
        if not len(prompt) or not len(answer) or not 0 <= one.depth <= 1 or one.distance < 0:
            raise ShapeError(
                f"{where}: {len(prompt)} ids, {len(answer)} ids as answer, depth {one.depth:g}, {one.distance} behind"
            )
        self._check_length(len(prompt) + len(answer) - 1, where)
        return replace(one, prompt=prompt, answer=answer)

    def _validate_ids(self, values: Any, label: str = "a document") -> Array:
        ids = np.asarray(values)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ShapeError(f"{label} is no row of ids", hint="let the recipe make arrays of integers, (tokens,) each")
        if len(ids):
            make_decoder_spec(self.candidate.engine.interface).check_ids(ids, label)
        return ids.astype(np.int64)

    def _check_length(self, tokens: int, label: str) -> None:
        if tokens < 1 or (self.max_sequence_length is not None and tokens > self.max_sequence_length):
            raise ShapeError(
                f"{label} feeds {tokens} tokens, a sequence may have 1..{self.max_sequence_length}", hint="ask for fewer"
            )


def _max_sequence_length(candidate: EvaluatedDecoder, model: torch.nn.Module) -> int | None:
    """Return how many tokens a sequence may have, to the subject and to the baseline; None: any number."""
    bounds = (
        candidate.engine.interface.capacity,
        candidate.cache_spec.max_positions,
        getattr(model.config, "max_position_embeddings", None),
    )
    return min((one for one in bounds if one is not None), default=None)


def _select_evaluation(
    recipe_evaluation: EvaluationData | None, data: str | None, candidate: EvaluatedDecoder, name: str
) -> EvaluationData:
    """Return the documents and tasks that are measured; raises UsageError where there are none."""
    if data is None:
        if recipe_evaluation is None:
            raise UsageError(f"`{name}` brings nothing to evaluate on", hint="give documents: --data FILE.npz")
        return recipe_evaluation
    streams = documents_from_samples(data, make_decoder_spec(candidate.engine.interface).ids)
    return EvaluationData(streams=streams, tasks=recipe_evaluation.tasks if recipe_evaluation else ())


def _describe_data(source: str, evaluation: EvaluationData, run: _EvaluationRun) -> str:
    """Return what was measured on, as it was found: there may be fewer documents than were asked for."""
    asked = [f"{run.config.questions} questions of `{task.name}`" for task in evaluation.tasks if run.config.questions]
    parts = [f"{run.document_count} documents", *asked, f"{run.continuation_count} continuations"]
    return f"{source}, seed {run.config.seed}: {', '.join(parts)}"


def _with_evaluation(manifest: Manifest, variant_path: str, result: EvaluationRecord) -> Manifest:
    """Return `manifest` with `result` added to the variant at `path`."""
    return msgspec.structs.replace(
        manifest,
        graphs=tuple(
            msgspec.structs.replace(
                graph,
                variants=tuple(
                    msgspec.structs.replace(variant, evaluations=(*variant.evaluations, result))
                    if variant.path == variant_path
                    else variant
                    for variant in graph.variants
                ),
            )
            for graph in manifest.graphs
        ),
    )
