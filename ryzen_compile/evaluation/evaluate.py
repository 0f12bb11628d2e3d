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

from ryzen_compile.artifacts.package.manifest import Evaluated, Finding, Manifest
from ryzen_compile.artifacts.package.write import replace_manifest
from ryzen_compile.errors import ModelError, ShapeError, UsageError
from ryzen_compile.evaluation import generation, perplexity
from ryzen_compile.evaluation.criteria import check, judged, parse
from ryzen_compile.evaluation.documents import in_samples
from ryzen_compile.evaluation.evaluated_decoder import Subject, opened
from ryzen_compile.evaluation.systems import Columns
from ryzen_compile.evaluation.tasks import ask
from ryzen_compile.evaluation.token_decoders import SessionDecoder, TorchDecoder, causal_lm
from ryzen_compile.progress import Progress, Silent
from ryzen_compile.runtime.generation.decoder_spec import decoder_of, nearest
from ryzen_compile.runtime.generation.sampling import Sampling
from ryzen_compile.spec.recipe import Evaluation, Question, Recipe, Task
from ryzen_compile.torch_module import Loaded, load_module, silence
from ryzen_compile.utils.record import utc_now

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]

BEYOND = 8
"""Long generation goes on for this many times as many tokens as a head keeps, where the model has positions for it."""
_ALONE = ("perplexity-ratio", "agreement", "kl", "rewrite-agreement", "rewrite-max-abs", "stays", "rewrite-stays")


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """How much is measured, and how it is fed. Raises UsageError for numbers out of range."""

    documents: int = 8
    """At least 0; with 0 no text is measured."""
    tokens: int | None = None
    """How many tokens of a document count, at least 2; None: as many as the decoder takes."""
    questions: int = 50
    """Of each task; at least 0."""
    continuations: int = 4
    """At least 0."""
    prompt: int = 64
    """How many tokens of a document a continuation begins with: at least 1."""
    new_tokens: int | None = None
    """How long a continuation is, at least 1; None: BEYOND times the budget, or as long as the model has positions for."""
    temperature: float = 1.0
    """Of continuations; 0 is greedy."""
    chunk: int = 1
    """How many tokens of text and prompts a step feeds, at least 1: 1 is what generating does."""
    rows: int = 8
    """How many sequences are run together, at least 1."""
    seed: int = 0
    """Of documents, questions and what continuations draw: at least 0."""

    def __post_init__(self) -> None:
        least = {"documents": 0, "tokens": 2, "questions": 0, "continuations": 0, "prompt": 1, "new_tokens": 1, "chunk": 1}
        for name, low in {**least, "rows": 1, "seed": 0}.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UsageError(f"`{name}` is {value}", hint=f"it must be at least {low}")
        Sampling(temperature=self.temperature)


def evaluate(
    subject: str | os.PathLike[str],
    *,
    baseline: str | Recipe,
    data: str | None = None,
    require: Sequence[str] = (),
    amounts: Amounts | None = None,
    graph: str | None = None,
    backend: str | None = None,
    progress: Progress | None = None,
) -> Evaluated:
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
    progress, amounts = progress or Silent(), amounts or Amounts()
    required, started = parse(require), time.perf_counter()
    with silence():
        loaded = load_module(baseline.removeprefix("recipe:") if isinstance(baseline, str) else baseline)
        model = causal_lm(loaded.module, loaded.name)
    brought = loaded.recipe.evaluation if loaded.recipe else None
    with opened(subject, graph=graph, backend=backend) as found:
        job = _Job(found, loaded, model, amounts, progress)
        evaluation = _evaluation(brought, data, found, loaded.name)
        names = ([*perplexity.NAMES] if amounts.documents else []) + ([*generation.NAMES] if amounts.continuations else [])
        names += [task.name for task in evaluation.tasks] if amounts.questions else []
        check(required, known=names, alone=_ALONE)
        findings = judged(job.run(evaluation), required)
        result = Evaluated(
            subject=found.engine.choice.says,
            baseline=f"{loaded.name}, by PyTorch",
            method=job.method,
            where=found.where,
            data=_spelt(data or f"recipe {loaded.name}", evaluation, job),
            steps="one token a step" if amounts.chunk == 1 else f"{amounts.chunk} tokens a step",
            findings=findings,
            met=all(one.met for one in findings),
            when=utc_now(),
            seconds=time.perf_counter() - started,
            notes=tuple(job.notes),
        )
    if found.package is not None:
        replace_manifest(found.package, _recorded(found.package.manifest, found.variant or "", result))
    return result


class _Job:
    """One evaluation under way."""

    def __init__(self, subject: Subject, loaded: Loaded, model: torch.nn.Module, amounts: Amounts, progress: Progress) -> None:
        self.subject, self.loaded, self.model, self.amounts, self.progress = subject, loaded, model, amounts, progress
        self.notes: list[str] = []
        self.documents = self.continuations = 0
        layers = getattr(model.config, "num_hidden_layers", None)
        if layers is not None and layers != len(subject.told.layers):
            raise ModelError(
                f"`{loaded.name}` has {layers} layers, the subject {len(subject.told.layers)}",
                hint="name the recipe that it was exported from",
            )
        self.longest = _longest(subject, model)
        self._make_method = self._method()

    def _method(self) -> Any:
        """Return what makes the caches of the middle column, and say what that is."""
        words = self.subject.method
        self.method = f"{words}, in torch"
        if words is None:
            self.method = "none: the caches lose nothing, and the rewrite is held to the baseline itself"
            return None
        try:
            make = self.subject.in_torch(self.model)
        except ModelError as why:
            self.method = f"none: {why.says}; the rewrite is held to the baseline itself"
            return None
        if make is None:
            self.method = f"none: {words} has no form in torch; the rewrite is held to the baseline itself"
        return make

    def run(self, evaluation: Evaluation) -> list[Finding]:
        """Measure everything."""
        amounts, findings = self.amounts, list[Finding]()
        with self._columns() as columns:
            documents = self._documents(evaluation)
            if documents:
                with self.progress.stage(f"foretell {len(documents)} documents"):
                    findings += perplexity.foretell(columns, documents, chunk=amounts.chunk, seed=amounts.seed)
            for task in evaluation.tasks if amounts.questions else ():
                with self.progress.stage(f"answer {amounts.questions} questions of `{task.name}`"):
                    questions = [self._question(task, amounts.seed + nth) for nth in range(amounts.questions)]
                    findings += ask(columns, task.name, questions, chunk=amounts.chunk)
            if amounts.continuations:
                findings += self._generation(columns, evaluation)
        if not findings:
            raise UsageError("nothing was measured", hint="ask for documents, questions or continuations")
        return findings

    @contextmanager
    def _columns(self) -> Iterator[Columns]:
        from transformers import DynamicCache

        engine, config = self.subject.engine, self.model.config
        most = max(self.amounts.documents, self.amounts.questions, self.amounts.continuations, 1)
        rows = min(self.amounts.rows, most)
        batch = nearest(rows, decoder_of(engine.interface).batches(engine.profiles))
        with engine.session(batch) as session:
            subject = SessionDecoder(session, name="the subject")
            subject.check(self.amounts.chunk)
            subject.check(1)
            baseline = TorchDecoder(
                self.model, lambda: DynamicCache(config=config), name=f"`{self.loaded.name}`", is_exact=True
            )
            method = None
            if self._make_method is not None:
                method = TorchDecoder(
                    self.model, self._make_method, name=f"`{self.loaded.name}` with the method", is_exact=False
                )
            yield Columns(baseline=baseline, method=method, subject=subject, rows=min(rows, batch))

    def _documents(self, evaluation: Evaluation) -> list[Array]:
        """Return the beginnings of the documents that count, (tokens,) ids each."""
        amounts = self.amounts
        wanted = self.longest + 1 if self.longest is not None else None
        if amounts.tokens is not None:
            self._check_fits(amounts.tokens - 1, "a document")
            wanted = amounts.tokens
        found = [self._ids(one)[:wanted] for one in islice(evaluation.streams(amounts.seed), amounts.documents)]
        self.documents = len(found)
        if amounts.documents and not found:
            raise ShapeError("there is no document", hint="give --data, or --documents 0")
        if any(len(one) < 2 for one in found):
            raise ShapeError("a document holds fewer than 2 tokens: there is nothing to foretell")
        return found

    def _generation(self, columns: Columns, evaluation: Evaluation) -> list[Finding]:
        amounts = self.amounts
        prompts = [self._ids(one)[: amounts.prompt] for one in islice(evaluation.streams(amounts.seed), amounts.continuations)]
        if not prompts or any(len(one) < amounts.prompt for one in prompts):
            raise ShapeError(
                f"a document holds fewer than the {amounts.prompt} tokens of a prompt", hint="choose another --prompt"
            )
        self.continuations = len(prompts)
        budget = max(layer.slots or 0 for layer in self.subject.told.layers)
        room = None if self.longest is None else self.longest - amounts.prompt
        new = amounts.new_tokens or min(BEYOND * budget, room if room is not None else BEYOND * budget)
        self._check_fits(amounts.prompt + new, "a continuation")
        self.notes.append(
            f"continuations are of {new} tokens behind {amounts.prompt}, {new / budget:.1f} times the {budget} that a head "
            f"keeps at most, {f'drawn at a temperature of {amounts.temperature:g}' if amounts.temperature else 'greedy'}"
        )
        sampling = Sampling(temperature=amounts.temperature)
        with self.progress.stage(f"continue {len(prompts)} documents by {new} tokens"):
            return generation.go_on(columns, prompts, new=new, sampling=sampling, chunk=amounts.chunk, seed=amounts.seed)

    def _question(self, task: Task, seed: int) -> Question:
        """Return a question that can be asked."""
        where, one = f"a question of `{task.name}`, seed {seed}", task.make(seed)
        prompt, answer = self._ids(one.prompt, where), self._ids(one.answer, where)
        if not len(prompt) or not len(answer) or not 0 <= one.depth <= 1 or one.distance < 0:
            raise ShapeError(
                f"{where}: {len(prompt)} ids, {len(answer)} ids as answer, depth {one.depth:g}, {one.distance} behind"
            )
        self._check_fits(len(prompt) + len(answer) - 1, where)
        return replace(one, prompt=prompt, answer=answer)

    def _ids(self, row: Any, where: str = "a document") -> Array:
        ids = np.asarray(row)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ShapeError(f"{where} is no row of ids", hint="let the recipe make arrays of integers, (tokens,) each")
        if len(ids):
            decoder_of(self.subject.engine.interface).check_ids(ids, where)
        return ids.astype(np.int64)

    def _check_fits(self, tokens: int, what: str) -> None:
        if tokens < 1 or (self.longest is not None and tokens > self.longest):
            raise ShapeError(f"{what} feeds {tokens} tokens, a sequence may have 1..{self.longest}", hint="ask for fewer")


def _longest(subject: Subject, model: torch.nn.Module) -> int | None:
    """Return how many tokens a sequence may have, to the subject and to the baseline; None: any number."""
    bounds = (
        subject.engine.interface.capacity,
        subject.told.longest,
        getattr(model.config, "max_position_embeddings", None),
    )
    return min((one for one in bounds if one is not None), default=None)


def _evaluation(brought: Evaluation | None, data: str | None, subject: Subject, name: str) -> Evaluation:
    """Return the documents and tasks that are measured; raises UsageError where there are none."""
    if data is None:
        if brought is None:
            raise UsageError(f"`{name}` brings nothing to evaluate on", hint="give documents: --data FILE.npz")
        return brought
    streams = in_samples(data, decoder_of(subject.engine.interface).ids)
    return Evaluation(streams=streams, tasks=brought.tasks if brought else ())


def _spelt(source: str, evaluation: Evaluation, job: _Job) -> str:
    """Return what was measured on, as it was found: there may be fewer documents than were asked for."""
    asked = [f"{job.amounts.questions} questions of `{task.name}`" for task in evaluation.tasks if job.amounts.questions]
    parts = [f"{job.documents} documents", *asked, f"{job.continuations} continuations"]
    return f"{source}, seed {job.amounts.seed}: {', '.join(parts)}"


def _recorded(manifest: Manifest, path: str, result: Evaluated) -> Manifest:
    """Return `manifest` with `result` added to the variant at `path`."""
    return msgspec.structs.replace(
        manifest,
        graphs=tuple(
            msgspec.structs.replace(
                graph,
                variants=tuple(
                    msgspec.structs.replace(variant, evaluations=(*variant.evaluations, result))
                    if variant.path == path
                    else variant
                    for variant in graph.variants
                ),
            )
            for graph in manifest.graphs
        ),
    )
