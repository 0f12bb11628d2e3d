"""Evaluation of a decoder against its PyTorch baseline on text, tasks and long generation."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import numpy as np

from ryzen_compile.artifacts.package.manifest import EvaluationRecord, Manifest, MetricResult
from ryzen_compile.artifacts.package.read import read_package
from ryzen_compile.artifacts.package.reference import input_digests, parse_load_request
from ryzen_compile.artifacts.package.write import replace_manifest
from ryzen_compile.data.documents import documents_from_samples
from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.errors import ModelError, ShapeError, UsageError
from ryzen_compile.evaluation import generation, perplexity, tasks
from ryzen_compile.evaluation.evaluated_decoder import EvaluatedDecoder, open_decoder
from ryzen_compile.evaluation.requirements import apply_requirements, check_requirements, parse_requirements
from ryzen_compile.evaluation.systems import Systems
from ryzen_compile.evaluation.token_decoders import SessionDecoder, TorchDecoder, find_causal_lm
from ryzen_compile.jobs.executor import LocalExecutor
from ryzen_compile.jobs.job import Job, JobKey, JobOutput, Resources, runs
from ryzen_compile.processes.limits import ResourceLimits
from ryzen_compile.progress import Progress, SilentProgress, StageItems
from ryzen_compile.runtime.generation.decoder_spec import make_decoder_spec, nearest_size
from ryzen_compile.runtime.generation.sampling import SamplingParams
from ryzen_compile.spec.recipe import EvaluationData, Question, Recipe, Task
from ryzen_compile.torch_module import LoadedModule, load_module, suppress_output
from ryzen_compile.utils.amounts import amount
from ryzen_compile.utils.files import file_label
from ryzen_compile.utils.record import Record, utc_now

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]

CONTINUATION_BUDGET_FACTOR = 8
"""The default length of a continuation as a multiple of the tokens kept per head, if the model has enough positions."""
_COMPARISON_METRICS = (
    "perplexity-ratio",
    "agreement",
    "kl",
    "rewrite-agreement",
    "rewrite-max-abs",
    "matching-prefix",
    "rewrite-matching-prefix",
)
"""The metrics that measure the distance to another system, for which the baseline has no value."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The amount of data of an evaluation and how it is fed. Raises UsageError for numbers out of range."""

    documents: int = 8
    """The number of documents, at least 0; with 0 no text is measured."""
    tokens: int | None = None
    """The number of tokens used of each document, at least 2; None: as many as the decoder takes."""
    questions: int = 50
    """The number of questions of each task, at least 0."""
    continuations: int = 4
    """The number of documents to continue, at least 0."""
    prompt_tokens: int = 64
    """The number of tokens of a document that form the prompt of a continuation, at least 1."""
    new_tokens: int | None = None
    """The length of a continuation, at least 1; None: CONTINUATION_BUDGET_FACTOR times the tokens kept per head, or as many
    as the model has positions for if that is fewer."""
    temperature: float = 1.0
    """The sampling temperature of continuations; 0 is greedy."""
    chunk_size: int = 1
    """The number of tokens of documents and prompts per step, at least 1; 1 corresponds to generation."""
    batch_size: int = 8
    """The largest number of sequences that run together, at least 1."""
    seed: int = 0
    """The seed of documents, questions and sampling, at least 0."""

    def __post_init__(self) -> None:
        minima = {
            "documents": 0,
            "tokens": 2,
            "questions": 0,
            "continuations": 0,
            "prompt_tokens": 1,
            "new_tokens": 1,
            "chunk_size": 1,
            "batch_size": 1,
            "seed": 0,
        }
        for name, minimum in minima.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise UsageError(f"`{name}` must be at least {minimum} (got {value})")
        SamplingParams(temperature=self.temperature)

    def sample(self) -> EvaluationConfig:
        """Return the configuration that measures a sample: at most 2 documents, 5 questions per task and 1 continuation."""
        return replace(
            self,
            documents=min(self.documents, 2),
            questions=min(self.questions, 5),
            continuations=min(self.continuations, 1),
        )


def evaluate(
    candidate: str | os.PathLike[str],
    *,
    baseline: str | Recipe,
    data: str | None = None,
    requirements: Sequence[str] = (),
    config: EvaluationConfig | None = None,
    graph: str | None = None,
    variant: str | None = None,
    backend: str | None = None,
    statistics: str | os.PathLike[str] | None = None,
    limits: ResourceLimits | None = None,
    progress: Progress | None = None,
) -> EvaluationRecord:
    """Evaluate a decoder with static caches, a package or an ONNX file, against the PyTorch module of a recipe.

    It runs in a child process within `limits`, or in this process if `baseline` is a recipe that exists here only.

    Up to three systems run side by side: the baseline, which keeps all tokens; the baseline with the candidate's KV method
    in PyTorch; and the candidate. The second compared with the first shows the cost of the method, the third compared with
    the second shows the error of the rewrite. The metrics are `perplexity.METRIC_NAMES` over documents, the accuracy of each
    task of the recipe, and `generation.METRIC_NAMES` over long continuations. Every value has a 95 % confidence interval:
    Wilson score intervals for shares of questions, bootstrap over documents or continuations for the others.

    `baseline` is a recipe or its name, or `file.py:function`; its module is, or contains, a Transformers causal language
    model. Documents and tasks come from the recipe's `evaluation`; `data` replaces the documents by samples, as for `--data`:
    ids of shape (documents, tokens) by the name of the ids input. `requirements` are conditions such as `perplexity<=1.01x`.
    `graph`, `variant` and `backend` are as in `load`; `candidate` may name them too, as in `model.ryzen#GRAPH@VARIANT`.
    `statistics` is the file of a calibrated score, or the folder that contains it under its original name; by default the
    folder that contains the candidate. The graph records the digest of the file, by which it is identified. The
    result is added to the package's manifest whether or not the requirements are met.

    Raises UsageError if there is nothing to measure or a requirement is invalid, ShapeError for documents that do not fit, and
    RyzenError if the candidate is not such a decoder or the baseline cannot run.
    """
    path = parse_load_request(os.fspath(candidate), graph=graph, variant=variant, backend=backend).path
    package = read_package(path) if path.is_dir() else None
    inputs = input_digests(path)
    key = EvaluationKey(
        candidate=next(iter(inputs.values()), ""),
        baseline=baseline if isinstance(baseline, str) else baseline.name,
        data=data,
        requirements=tuple(requirements),
        config=config or EvaluationConfig(),
        graph=graph,
        variant=variant,
        backend=backend,
        statistics=os.fspath(statistics) if statistics is not None else None,
    )
    # A recipe that exists in this process only is evaluated here.
    run = None if isinstance(baseline, str) else functools.partial(run_evaluation_job, baseline=baseline)
    executor = LocalExecutor(None, progress or SilentProgress(), functions={EvaluationJob: run} if run else None)
    job = EvaluationJob(key=key, inputs=inputs, resources=Resources.within(limits), candidate=os.fspath(candidate))
    result = executor.run(job, Path()).result
    if package is not None:
        replace_manifest(package, _with_evaluation(package.manifest, result.variant_path or "", result.record))
    return result.record


class EvaluationKey(JobKey, frozen=True):
    """What is evaluated. No key covers all files that the code of a baseline may read, so no result is reused."""

    kind: ClassVar[str] = "evaluation"

    candidate: str
    """The digest of the package or ONNX file."""
    baseline: str
    data: str | None
    requirements: tuple[str, ...]
    config: EvaluationConfig
    graph: str | None
    variant: str | None
    backend: str | None
    statistics: str | None


class EvaluationResult(Record, frozen=True):
    """The record of an evaluation, and the variant that it is about."""

    record: EvaluationRecord
    variant_path: str | None
    """The path of the variant in the package; None for an ONNX file."""


class EvaluationJob(Job[EvaluationResult], frozen=True, kw_only=True):
    """Evaluate a decoder against its PyTorch baseline."""

    result_type: ClassVar[Any] = EvaluationResult
    cacheable: ClassVar[bool] = False
    isolated: ClassVar[bool] = True

    key: EvaluationKey
    candidate: str
    """The package, with #GRAPH and @VARIANT, or ONNX file, in the folder of the job."""


@runs(EvaluationJob)
def run_evaluation_job(
    job: EvaluationJob, folder: Path, progress: Progress, *, baseline: str | Recipe | None = None
) -> JobOutput[EvaluationResult]:
    """Run the evaluation; see `evaluate`. `baseline` is the baseline that the key names, if it was created in this process."""
    key, started = job.key, time.perf_counter()
    config, source = key.config, baseline if baseline is not None else key.baseline
    parsed_requirements = parse_requirements(key.requirements)
    with progress.stage("load the baseline"), suppress_output():
        loaded = load_module(source)
        model = find_causal_lm(loaded.module, loaded.name)
    recipe_evaluation = loaded.recipe.evaluation if loaded.recipe else None
    candidate = folder / job.candidate
    with open_decoder(candidate, graph=key.graph, variant=key.variant, backend=key.backend) as decoder:
        locations = [Path(key.statistics)] if key.statistics is not None else []
        run = _EvaluationRun(decoder, loaded, model, config, locations, progress)
        evaluation = _select_evaluation(recipe_evaluation, key.data, decoder, loaded.name)
        metric_names = [
            *(perplexity.METRIC_NAMES if config.documents else ()),
            *(generation.METRIC_NAMES if config.continuations else ()),
            *(task.name for task in evaluation.tasks if config.questions),
        ]
        check_requirements(parsed_requirements, metric_names=metric_names, comparison_metrics=_COMPARISON_METRICS)
        results = apply_requirements(run.run(evaluation), parsed_requirements)
        data_name = file_label(key.data) if key.data else f"recipe {file_label(loaded.name)}"
        record = EvaluationRecord(
            candidate=decoder.engine.choice.summary,
            baseline=f"{file_label(loaded.name)}, by PyTorch",
            method=run.method_summary,
            machine=decoder.machine,
            data=_describe_data(data_name, evaluation, run),
            step_mode="1 token per step" if config.chunk_size == 1 else f"{config.chunk_size} tokens per step",
            results=results,
            met=all(result.met for result in results),
            timestamp=utc_now(),
            seconds=time.perf_counter() - started,
            notes=tuple(run.notes),
        )
        return JobOutput(result=EvaluationResult(record=record, variant_path=decoder.variant_path))


@dataclass(frozen=True, kw_only=True)
class _Measurement:
    """A part of an evaluation, with its data."""

    title: str
    """What is measured: `8 documents of 2,048 tokens`."""
    steps: int
    """The number of steps that it counts in the stage."""
    run: Callable[..., list[MetricResult]]
    """Measures, with the keyword argument `stage`."""


class _EvaluationRun:
    """The state of one evaluation."""

    def __init__(
        self,
        candidate: EvaluatedDecoder,
        loaded: LoadedModule,
        model: torch.nn.Module,
        config: EvaluationConfig,
        statistics: Sequence[Path],
        progress: Progress,
    ) -> None:
        self.candidate, self.loaded, self.model, self.config, self.progress = candidate, loaded, model, config, progress
        self.statistics = statistics
        self.notes: list[str] = []
        self.document_count = self.continuation_count = 0
        layer_count = getattr(model.config, "num_hidden_layers", None)
        if layer_count is not None and layer_count != len(candidate.cache_spec.layers):
            raise ModelError(
                f"`{loaded.name}` has {layer_count} layers, the candidate has {len(candidate.cache_spec.layers)}",
                hint="give the recipe from which the candidate was exported",
            )
        self.max_sequence_length = _max_sequence_length(candidate, model)
        self._make_method_cache = self._method_cache_factory()

    def _method_cache_factory(self) -> Any:
        """Return the cache factory of the system `method`, or None; set `method_summary`."""
        summary = self.candidate.method_summary
        self.method_summary = f"{summary}, in torch"
        if summary is None:
            self.method_summary = "none: the caches are lossless; the candidate is compared with the baseline itself"
            return None
        try:
            make_cache = self.candidate.torch_cache_factory(self.model, self.statistics)
        except ModelError as error:
            self.method_summary = f"none: {error.message}; the candidate is compared with the baseline itself"
            return None
        if make_cache is None:
            self.method_summary = (
                f"none: {summary} has no PyTorch implementation; the candidate is compared with the baseline itself"
            )
        return make_cache

    def run(self, evaluation: EvaluationData) -> list[MetricResult]:
        """Measure all metrics; raises UsageError if there are none."""
        with self._open_systems() as systems:
            measurements = self._prepare(systems, evaluation)
            if not measurements:
                raise UsageError("nothing to measure", hint="request documents, questions or continuations")
            steps = sum(measurement.steps for measurement in measurements)
            more = "" if self.config == self.config.sample() else "; --quick measures a sample"
            message = f"evaluates {', '.join(measurement.title for measurement in measurements)}: {amount(steps, 'step')}{more}"
            self.progress.report(Diagnostic(code="evaluation-started", severity="info", message=message))
            with self.progress.stage("evaluate", StageItems("steps", steps)) as stage:
                return [result for measurement in measurements for result in measurement.run(stage=stage)]

    def _prepare(self, systems: Systems, evaluation: EvaluationData) -> list[_Measurement]:
        """Return what is measured, with data that are valid."""
        config, measurements = self.config, list[_Measurement]()
        chunk_size, seed = config.chunk_size, config.seed
        if documents := self._load_documents(evaluation):
            measurements.append(
                _Measurement(
                    title=f"{amount(len(documents), 'document')} of {_token_range(documents)} tokens",
                    steps=perplexity.count_steps(systems, documents, chunk_size=chunk_size),
                    run=functools.partial(perplexity.measure_perplexity, systems, documents, chunk_size=chunk_size, seed=seed),
                )
            )
        for task in evaluation.tasks if config.questions else ():
            questions = [self._make_question(task, seed + index) for index in range(config.questions)]
            measurements.append(
                _Measurement(
                    title=f"{amount(len(questions), 'question')} of `{task.name}`",
                    steps=tasks.count_steps(systems, questions, chunk_size=chunk_size),
                    run=functools.partial(tasks.measure_task, systems, task.name, questions, chunk_size=chunk_size),
                )
            )
        if config.continuations:
            prompts, new_tokens = self._load_prompts(evaluation)
            measurements.append(
                _Measurement(
                    title=f"{amount(len(prompts), 'continuation')} of {new_tokens:,} tokens",
                    steps=generation.count_steps(systems, prompts, new_tokens=new_tokens, chunk_size=chunk_size),
                    run=functools.partial(
                        generation.measure_generation,
                        systems,
                        prompts,
                        new_tokens=new_tokens,
                        sampling=SamplingParams(temperature=config.temperature),
                        chunk_size=chunk_size,
                        seed=seed,
                    ),
                )
            )
        return measurements

    @contextmanager
    def _open_systems(self) -> Iterator[Systems]:
        from transformers import DynamicCache

        engine, model_config = self.candidate.engine, self.model.config
        max_items = max(self.config.documents, self.config.questions, self.config.continuations, 1)
        rows = min(self.config.batch_size, max_items)
        batch_size = nearest_size(rows, make_decoder_spec(engine.interface).batch_ranges(engine.profiles))
        with engine.session(batch_size) as session:
            candidate = SessionDecoder(session, name="the candidate")
            candidate.check_step_size(self.config.chunk_size)
            candidate.check_step_size(1)
            baseline = TorchDecoder(
                self.model, lambda: DynamicCache(config=model_config), name=f"`{self.loaded.name}`", is_chunk_invariant=True
            )
            method = None
            if self._make_method_cache is not None:
                name = f"`{self.loaded.name}` with the KV method"
                method = TorchDecoder(self.model, self._make_method_cache, name=name, is_chunk_invariant=False)
            yield Systems(baseline=baseline, method=method, candidate=candidate, batch_size=min(rows, batch_size))

    def _load_documents(self, evaluation: EvaluationData) -> list[Array]:
        """Return the documents, cut to the number of tokens used; token ids of shape (tokens,) each."""
        config = self.config
        max_tokens = self.max_sequence_length + 1 if self.max_sequence_length is not None else None
        if config.tokens is not None:
            self._check_length(config.tokens - 1, "a document")
            max_tokens = config.tokens
        documents = [
            self._validate_ids(document)[:max_tokens]
            for document in islice(evaluation.documents(config.seed), config.documents)
        ]
        self.document_count = len(documents)
        if config.documents and not documents:
            raise ShapeError("there are no documents", hint="give --data, or --documents 0")
        if any(len(document) < 2 for document in documents):
            raise ShapeError("a document has fewer than 2 tokens: there is nothing to predict")
        return documents

    def _load_prompts(self, evaluation: EvaluationData) -> tuple[list[Array], int]:
        """Return the prompts of the continuations, token ids of shape (tokens,) each, and the number of tokens to generate."""
        config = self.config
        prompts = [
            self._validate_ids(document)[: config.prompt_tokens]
            for document in islice(evaluation.documents(config.seed), config.continuations)
        ]
        if not prompts or any(len(prompt) < config.prompt_tokens for prompt in prompts):
            raise ShapeError(
                f"a document has fewer than the {config.prompt_tokens} tokens of a prompt", hint="choose another --prompt"
            )
        self.continuation_count = len(prompts)
        budget = max(layer.policy.slots or 0 for layer in self.candidate.cache_spec.layers)
        new_tokens = config.new_tokens or CONTINUATION_BUDGET_FACTOR * budget
        if config.new_tokens is None and self.max_sequence_length is not None:
            new_tokens = min(new_tokens, self.max_sequence_length - config.prompt_tokens)
        self._check_length(config.prompt_tokens + new_tokens, "a continuation")
        self.notes.append(
            f"continuations have {new_tokens} tokens after a prompt of {config.prompt_tokens}, {new_tokens / budget:.1f} times "
            f"the {budget} tokens that a head keeps at most, "
            f"{f'sampled at temperature {config.temperature:g}' if config.temperature else 'greedy'}"
        )
        return prompts, new_tokens

    def _make_question(self, task: Task, seed: int) -> Question:
        """Return a validated question."""
        label, question = f"a question of `{task.name}`, seed {seed}", task.make_question(seed)
        prompt, answer = self._validate_ids(question.prompt, label), self._validate_ids(question.answer, label)
        if not len(prompt) or not len(answer) or not 0 <= question.depth <= 1 or question.distance < 0:
            raise ShapeError(
                f"{label}: it needs a prompt, an answer, a depth in [0, 1] and a distance of at least 0 (got {len(prompt)} "
                f"prompt ids, {len(answer)} answer ids, depth {question.depth:g}, distance {question.distance})"
            )
        self._check_length(len(prompt) + len(answer) - 1, label)
        return replace(question, prompt=prompt, answer=answer)

    def _validate_ids(self, values: Any, label: str = "a document") -> Array:
        ids = np.asarray(values)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ShapeError(
                f"{label} must be a 1-D array of integer ids (got {ids.dtype} of rank {ids.ndim})",
                hint="return integer arrays of shape (tokens,) from the recipe",
            )
        if len(ids):
            make_decoder_spec(self.candidate.engine.interface).check_ids(ids, label)
        return ids.astype(np.int64)

    def _check_length(self, tokens: int, label: str) -> None:
        if tokens < 1 or (self.max_sequence_length is not None and tokens > self.max_sequence_length):
            raise ShapeError(
                f"{label} feeds {tokens} tokens; a sequence may have 1..{self.max_sequence_length}", hint="request fewer tokens"
            )


def _token_range(documents: Sequence[Array]) -> str:
    """Return the number of tokens of each document: `2,048`, or `100 to 2,048`."""
    shortest, longest = min(map(len, documents)), max(map(len, documents))
    return f"{longest:,}" if shortest == longest else f"{shortest:,} to {longest:,}"


def _max_sequence_length(candidate: EvaluatedDecoder, model: torch.nn.Module) -> int | None:
    """Return the largest number of tokens of a sequence that candidate and baseline both support; None: unlimited."""
    limits = (
        candidate.engine.interface.capacity,
        candidate.cache_spec.max_positions,
        getattr(model.config, "max_position_embeddings", None),
    )
    return min((limit for limit in limits if limit is not None), default=None)


def _select_evaluation(
    recipe_evaluation: EvaluationData | None, data: str | None, candidate: EvaluatedDecoder, name: str
) -> EvaluationData:
    """Return the documents and tasks to measure; raises UsageError if there are none."""
    if data is None:
        if recipe_evaluation is None:
            raise UsageError(f"`{name}` has no evaluation data", hint="give documents: --data FILE.npz or FILE.txt")
        return recipe_evaluation
    ids = make_decoder_spec(candidate.engine.interface).ids
    documents = documents_from_samples(
        data, ids, lambda: candidate.engine.tokenizer if candidate.engine.has_tokenizer else None
    )
    return EvaluationData(documents=documents, tasks=recipe_evaluation.tasks if recipe_evaluation else ())


def _describe_data(source: str, evaluation: EvaluationData, run: _EvaluationRun) -> str:
    """Return a description of the data with the actual counts; there may be fewer documents than requested."""
    config = run.config
    questions = [f"{amount(config.questions, 'question')} of `{task.name}`" for task in evaluation.tasks if config.questions]
    counts = [amount(run.document_count, "document"), *questions, amount(run.continuation_count, "continuation")]
    return f"{source}, seed {config.seed}: {', '.join(counts)}"


def _with_evaluation(manifest: Manifest, variant_path: str, result: EvaluationRecord) -> Manifest:
    """Return `manifest` with `result` added to the variant at `variant_path`."""
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
