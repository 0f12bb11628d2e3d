"""The public Python API: build, load, rewrite, compare, evaluate, export, and what goes with them.

`import ryzen_compile as rc` offers these functions as `rc.build`, ... They take what the command of the same name takes, with
every option as a keyword, and return records. They raise RyzenError, whose `diagnostics` hold one record for each problem, and
report everything else to a `Progress` listener. Importing this module imports no framework: each function imports what it
needs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

from ryzen_compile.errors import UsageError, did_you_mean
from ryzen_compile.progress import SilentProgress
from ryzen_compile.utils.arguments import checked
from ryzen_compile.utils.files import StrPath

if TYPE_CHECKING:
    from ryzen_compile.artifacts.package.manifest import EvaluationRecord
    from ryzen_compile.artifacts.package.read import Package
    from ryzen_compile.builder.in_memory import InMemoryModel
    from ryzen_compile.builder.rewrite import RewriteResult
    from ryzen_compile.exporter import ExportReport
    from ryzen_compile.numerics.candidate_lookup import ModelReference
    from ryzen_compile.numerics.compare_models import ComparisonReport
    from ryzen_compile.numerics.verify import Verification
    from ryzen_compile.processes.limits import ResourceLimits
    from ryzen_compile.progress import Progress
    from ryzen_compile.runtime.bench import Timings
    from ryzen_compile.runtime.load import Engine
    from ryzen_compile.spec.dtypes import Precision
    from ryzen_compile.spec.recipe import Recipe

Shapes: TypeAlias = str | Mapping[str, Sequence[int]]
"""The shapes of some inputs: `{"ids": (8, 128)}`, or in trtexec's syntax `"ids:8x128"`."""

MAX_SEED = 2**32 - 1
"""The largest seed that every random number generator accepts."""


@checked
def build(
    model: StrPath | Mapping[str, StrPath] | InMemoryModel,
    output: StrPath | None = None,
    *,
    gpu: str | Sequence[str] = "auto",
    backend: str | None = None,
    passes: str | Sequence[str] | None = None,
    precision: Precision | None = None,
    min_shapes: Shapes | Sequence[Shapes] = (),
    opt_shapes: Shapes | Sequence[Shapes] = (),
    max_shapes: Shapes | Sequence[Shapes] = (),
    options: Mapping[str, str | int | float | bool] | None = None,
    compare: bool = True,
    criteria: StrPath | None = None,
    accuracy_floor: str | None = None,
    baseline: str | None = None,
    data: StrPath | None = None,
    seed: int = 0,
    memory_limit_bytes: int | None = None,
    time_limit_seconds: float | None = None,
    allow_partial: bool = False,
    cache: StrPath | Literal[False] | None = None,
    progress: Progress | None = None,
) -> Package:
    """Build a package of engines from an ONNX file or a model in memory, and return it.

        package = rc.build("model.onnx", gpu="cpu,sm89", precision="fp16", max_shapes={"ids": (8, 512)})

    A target that cannot be built for, and a variant that cannot be compared, are recorded in the package with the reason, and
    the rest is written. A variant that does not meet its criteria is written with its measurements. In these cases a package
    that exists at `output` is kept, the new one is written next to it as `NAME.rejected.ryzen`, and an exception is raised.
    Any other failure writes nothing.

    Args:
        model: An ONNX file, a folder of ONNX files, files by graph name ({"prefill": "p.onnx", "decode": "d.onnx"}), an
            onnx.ModelProto, an onnx_ir.Model, a recipe, or (module, inputs), which is exported with the sizes of its inputs.
        output: The folder of the package; None: the path of the model with the suffix `.ryzen`.
        gpu: Targets, in a list or comma-separated: `cpu`, `sm89`, `rtx4090`, `sm89@windows`; `auto`: the GPUs of this machine,
            else `cpu`.
        backend: The only backend to use; None: any that supports the target.
        passes: The pipeline, as in `fold,precision{to=fp16}`, or several pipelines, each of which makes a variant of every
            graph; the first is the default of the package. `none`: no passes; None: the default passes of each backend.
        precision: The element type that engines compute in; None: that of the model.
        min_shapes: The smallest shapes, one entry for each profile; see `opt_shapes`.
        opt_shapes: The shapes to optimize for, one entry for each profile; alone, the only shapes. An input that is not named
            takes the sizes of the dimensions that it shares with others. Shapes that are not given are derived: all without
            any, the smallest with `max_shapes` alone, and the largest with `min_shapes` alone.
        max_shapes: The largest shapes, one entry for each profile; see `opt_shapes`.
        options: Builder options by trtexec's names: {"builderOptimizationLevel": 5}; True sets a flag.
        compare: Whether to compare every variant with its source over the grid of profiles.
        criteria: A success_criteria.toml file; None: the project's.
        accuracy_floor: What all lossy passes may cost together against the source, as `cosine=0.99`; None: no such limit.
        baseline: A PyTorch module that every variant is compared with too: `FILE.py:FUNCTION`, `recipe:NAME` or `hf:FOLDER`.
        data: Samples for calibration and comparison: `FILE.npz`, a folder of them, `FILE.py[:FUNCTION]` or `recipe:NAME`; None:
            random values.
        seed: The seed of all random values, in [0, 2**32 - 1].
        memory_limit_bytes: The maximum memory of every process that runs or compiles the model, in bytes; None: what is
            available.
        time_limit_seconds: The maximum duration of every process that runs or compiles the model, in seconds; None: no limit.
        allow_partial: Whether to accept a package without the targets and comparisons that failed.
        cache: The folder of the build cache; None: the user's cache folder; False: no cache.
        progress: A listener for stages and diagnostics.

    Raises:
        UsageError: An option is invalid.
        ModelError: A model file cannot be read.
        PipelineError: A pipeline cannot run; one diagnostic for each problem.
        BackendError: A target was refused, or a variant could not be compared.
        AccuracyError: A variant does not meet its criteria.
    """
    from ryzen_compile.builder import build as builder
    from ryzen_compile.builder.config import BuildConfig
    from ryzen_compile.builder.in_memory import as_model_files, check_model, names_files

    _check_choice("precision", precision, (None, "fp32", "fp16", "bf16"))
    _check_seed(seed)
    if output is None and not names_files(model):
        check_model(model)
        raise UsageError("a model in memory has no path for its package", hint='give output="model.ryzen"')
    config = BuildConfig(
        gpu=_joined(gpu),
        backend=backend,
        passes=passes,
        precision=precision,
        min_shapes=_shape_texts(min_shapes),
        opt_shapes=_shape_texts(opt_shapes),
        max_shapes=_shape_texts(max_shapes),
        options=_option_texts(options or {}),
        compare=compare,
        criteria=criteria,
        accuracy_floor=accuracy_floor,
        baseline=baseline,
        data=_path_text(data),
        seed=seed,
        limits=_limits(memory_limit_bytes, time_limit_seconds),
    )
    with as_model_files(model, limits=config.limits, progress=progress) as files:
        return builder.build(files, output, config=config, allow_partial=allow_partial, cache=cache, progress=progress)


@checked
def load(
    path: StrPath,
    *,
    graph: str | None = None,
    variant: str | None = None,
    backend: str | None = None,
    cache: StrPath | None = None,
    share_weights: bool | None = None,
) -> Engine:
    """Load a graph of a package on this machine: an engine that fits the GPU of this process, else the portable variant.

        with rc.load("model.ryzen") as engine:
            outputs = engine.run(input_ids=ids, attention_mask=mask)

    Digests are checked before any file is read. `engine.choice` states what was chosen, and why.

    Args:
        path: The folder of the package, or an ONNX file.
        graph: The graph to load; None: the only one, or the step graphs of one decoder, which then run as one engine.
        variant: The name of the variant to run, or a beginning of it that no other variant has; None: the default of each
            backend.
        backend: The only backend to use; None: any that can run here.
        cache: The folder for kernels that TensorRT-RTX compiles on first load; None: in the user's cache folder.
        share_weights: Whether the step graphs of a decoder on a CPU share their weights: they take the memory of one graph, and
            steps take longer, of one token 1.1 times, of 2 to 16 up to twice; None: if copies for each would take more than a
            quarter of the available memory.

    Raises:
        PackageError: The package is damaged, or nothing in it can run on this machine.
        UsageError: There is no such graph, variant or backend.
    """
    from ryzen_compile.runtime import load as runtime

    return runtime.load(path, graph=graph, variant=variant, backend=backend, cache=cache, share_weights=share_weights)


@checked
def rewrite(
    model: StrPath | InMemoryModel,
    output: StrPath,
    *,
    passes: str | Sequence[str],
    backend: str | None = None,
    data: StrPath | None = None,
    seed: int = 0,
    weights: Literal["auto", "inline", "external"] = "auto",
    memory_limit_bytes: int | None = None,
    time_limit_seconds: float | None = None,
    progress: Progress | None = None,
) -> RewriteResult:
    """Run passes on an ONNX file, verify their declared properties, and write the result.

        result = rc.rewrite("model.onnx", "folded.onnx", passes="fold")

    Every pass is run, including conversions to half precision that a package leaves out of its portable variant.

    Args:
        model: The ONNX file, or a model in memory as `build` takes it.
        output: The ONNX file to write; it must not be `model`.
        passes: The pipeline, as in `fold,precision{to=fp16}`, or a list of its passes.
        backend: The backend that the result is intended for; None: the one that runs portable variants.
        data: Calibration samples: `FILE.npz`, a folder of them, `FILE.py[:FUNCTION]` or `recipe:NAME`.
        seed: The seed of a recipe's samples, in [0, 2**32 - 1].
        weights: Where weights are stored: in the file, in one file next to it, or (`auto`) next to it from 1.5 GB.
        memory_limit_bytes: The maximum memory of every process that runs the model, in bytes; None: what is available.
        time_limit_seconds: The maximum duration of every process that runs the model, in seconds; None: no limit.
        progress: A listener for stages and diagnostics: moved passes, what each pass did, what it left unchanged.

    Raises:
        UsageError: An option is invalid.
        ModelError: The model cannot be read.
        PipelineError: The pipeline cannot run, or a pass refuses the model; nothing is written.
    """
    from ryzen_compile.backends.traits import portable_backend
    from ryzen_compile.builder import rewrite as rewriter
    from ryzen_compile.builder.in_memory import as_model_files

    _check_seed(seed)
    _check_choice("weights", weights, ("auto", "inline", "external"))
    config = rewriter.RewriteConfig(
        passes=_joined(passes),
        backend=backend or portable_backend(),
        data=_path_text(data),
        seed=seed,
    )
    limits = _limits(memory_limit_bytes, time_limit_seconds)
    with as_model_files(model, limits=limits, progress=progress) as file:
        if isinstance(file, Mapping):
            raise UsageError("`rewrite` takes one graph", hint="rewrite each graph alone")
        return rewriter.rewrite(file, output, config, weights=weights, limits=limits, progress=progress)


@checked
def rewrite_steps(
    model: StrPath,
    folder: StrPath,
    *,
    passes: str | Sequence[str],
    steps: str | Sequence[int | Literal["any"]],
    backend: str | None = None,
    data: StrPath | None = None,
    seed: int = 0,
    memory_limit_bytes: int | None = None,
    time_limit_seconds: float | None = None,
    progress: Progress | None = None,
) -> tuple[RewriteResult, ...]:
    """Run passes on a decoder once for each step width, and write one graph for each to a folder.

        rc.rewrite_steps("model.onnx", "decode", passes="kv-static{capacity=4096}", steps=[1, "any"])
        rc.build("decode")  # one package, whose engine selects the graph for the width of each step

    Args:
        model: The ONNX file of a decoder.
        folder: The folder to write; its graphs share their states and weights.
        passes: The pipeline, as in `kv-static{capacity=4096},kv-evict{budget=25%}`, or a list of its passes.
        steps: The tokens per step of each graph, at least 1, or `any` for a graph that takes any number: [1, "any"] or "1,any".
        backend: The backend that the result is intended for; None: the one that runs portable variants.
        data: Calibration samples: `FILE.npz`, a folder of them, `FILE.py[:FUNCTION]` or `recipe:NAME`.
        seed: The seed of a recipe's samples, in [0, 2**32 - 1].
        memory_limit_bytes: The maximum memory of every process that runs the model, in bytes; None: what is available.
        time_limit_seconds: The maximum duration of every process that runs the model, in seconds; None: no limit.
        progress: A listener for stages and diagnostics.

    Raises:
        UsageError: An option is invalid, or no pass makes steps of a decoder.
        ModelError: The model cannot be read.
        PipelineError: The pipeline cannot run, or a pass refuses the model; nothing is written.
    """
    from ryzen_compile.backends.traits import portable_backend
    from ryzen_compile.builder import rewrite as rewriter

    _check_seed(seed)
    config = rewriter.RewriteConfig(
        passes=_joined(passes), backend=backend or portable_backend(), data=_path_text(data), seed=seed
    )
    widths = rewriter.parse_step_widths(_joined(steps))
    limits = _limits(memory_limit_bytes, time_limit_seconds)
    return rewriter.rewrite_steps(model, folder, config, widths, limits=limits, progress=progress)


@checked
def compare(
    candidate: ModelReference,
    baseline: ModelReference,
    *,
    min_shapes: Shapes | Sequence[Shapes] = (),
    opt_shapes: Shapes | Sequence[Shapes] = (),
    max_shapes: Shapes | Sequence[Shapes] = (),
    data: StrPath | None = None,
    as_given: bool = False,
    criteria: StrPath | None = None,
    max_abs: float | None = None,
    relative_l2: float | None = None,
    cosine: float | None = None,
    top1: float | None = None,
    bisect: bool = False,
    source: StrPath | None = None,
    seed: int = 0,
    memory_limit_bytes: int | None = None,
    time_limit_seconds: float | None = None,
    progress: Progress | None = None,
) -> ComparisonReport:
    """Compare a package, an ONNX file or a PyTorch module with a baseline.

        report = rc.compare("model.ryzen", (module, inputs), max_abs=1e-3)
        assert report.met, report.diagnostics

    By default both run over a grid: the min, opt and max shapes of every profile, with identical and mixed rows in the batch.

    Args:
        candidate: A package (`model.ryzen`, `model.ryzen#GRAPH@VARIANT`), an ONNX file, `FILE.py:FUNCTION`, `recipe:NAME`, a
            recipe, a module, or (module, inputs).
        baseline: What to compare with, in the same forms; it must name one model.
        min_shapes: The smallest shapes, one entry for each profile; without any shapes, those of the candidate apply.
        opt_shapes: The optimum shapes, one entry for each profile.
        max_shapes: The largest shapes, one entry for each profile.
        data: Samples: `FILE.npz`, a folder of them, `FILE.py[:FUNCTION]` or `recipe:NAME`; None: those of the baseline or the
            candidate, else random values.
        as_given: Whether to run the samples of `data` unchanged instead of reshaped to the grid.
        criteria: A success_criteria.toml file; None: the accuracy floor of a lossy variant, otherwise the project's.
        max_abs: The largest allowed absolute difference of an element, at least 0.
        relative_l2: The largest allowed relative L2 difference of an output, at least 0.
        cosine: The smallest allowed cosine similarity of a vector with the baseline's, in [-1, 1].
        top1: The smallest allowed share of rows with the same argmax as the baseline, in [0, 1].
        bisect: Whether to find the first pass and node that differ, if a criterion is not met.
        source: For `bisect` of a package: the ONNX file that it was built from; None: the baseline.
        seed: The seed of all random values, in [0, 2**32 - 1].
        memory_limit_bytes: The maximum memory of the process that runs the models, in bytes; None: what is available.
        time_limit_seconds: The maximum duration of that process, in seconds; None: no limit.
        progress: A listener for stages and diagnostics.

    Raises:
        UsageError: A reference or an option is invalid.
        ShapeError: The inputs of the two differ.
        RyzenError: A model cannot be read or run.
    """
    from ryzen_compile.numerics.compare_models import ComparisonConfig, compare_models

    _check_seed(seed)
    config = ComparisonConfig(
        min_shapes=_shape_texts(min_shapes),
        opt_shapes=_shape_texts(opt_shapes),
        max_shapes=_shape_texts(max_shapes),
        data=_path_text(data),
        as_given=as_given,
        criteria=_path_text(criteria),
        max_abs=max_abs,
        relative_l2=relative_l2,
        cosine=cosine,
        top1=top1,
        seed=seed,
    )
    return compare_models(
        candidate,
        baseline,
        config=config,
        bisect=bisect,
        source=source,
        limits=_limits(memory_limit_bytes, time_limit_seconds),
        progress=progress,
    )


@checked
def evaluate(
    candidate: StrPath,
    *,
    baseline: str | Recipe,
    data: StrPath | None = None,
    requirements: Sequence[str] = (),
    documents: int = 8,
    tokens: int | None = None,
    questions: int = 50,
    continuations: int = 4,
    prompt_tokens: int = 64,
    new_tokens: int | None = None,
    temperature: float = 1.0,
    chunk_size: int = 1,
    batch_size: int = 8,
    quick: bool = False,
    seed: int = 0,
    graph: str | None = None,
    variant: str | None = None,
    backend: str | None = None,
    statistics: StrPath | None = None,
    memory_limit_bytes: int | None = None,
    time_limit_seconds: float | None = None,
    progress: Progress | None = None,
) -> EvaluationRecord:
    """Evaluate a decoder with fixed-size KV caches on text, tasks and long generation, against its PyTorch baseline.

        record = rc.evaluate("decode.ryzen", baseline="recipe:tinylm", requirements=["perplexity<=1.01x"])

    The record is added to the package, whether or not the requirements are met. docs/evaluate.md describes the metrics.

    Args:
        candidate: A package or an ONNX file.
        baseline: `recipe:NAME`, `hf:FOLDER`, `FILE.py:FUNCTION` whose function returns a recipe, or a recipe; its module is,
            or contains, a Transformers causal language model.
        data: Documents: `FILE.txt`, `FILE.npz`, a folder of them, or `FILE.py[:FUNCTION]`; None: those of the recipe.
        requirements: Criteria such as `perplexity<=1.01x` (relative to the baseline) or `kl<=0.02`.
        documents: The number of documents for perplexity, at least 0.
        tokens: The maximum tokens per document, at least 2; None: as many as the decoder takes.
        questions: The number of questions of each task, at least 0.
        continuations: The number of documents to continue, at least 0.
        prompt_tokens: The tokens of a document before its continuation, at least 1.
        new_tokens: The tokens of a continuation, at least 1; None: 8 times the tokens that a head keeps.
        temperature: The sampling temperature of continuations, at least 0; 0 is greedy.
        chunk_size: The tokens per step for documents and prompts, at least 1.
        batch_size: The largest number of sequences that run together, at least 1.
        quick: Whether to measure a sample: at most 2 documents, 5 questions of each task and 1 continuation.
        seed: The seed of documents, questions and sampling, in [0, 2**32 - 1].
        graph: The graph, if a package holds several that are not steps of one decoder.
        variant: The name of the variant, or a beginning of it; None: the default.
        backend: The backend to run on; None: the first that can run here.
        statistics: The file of a calibrated score, or a folder that contains it under its original name; None: the folder that
            contains the candidate. The graph records the digest of the file.
        memory_limit_bytes: The maximum memory of the process that runs the models, in bytes; None: what is available.
        time_limit_seconds: The maximum duration of that process, in seconds; None: no limit.
        progress: A listener for stages and diagnostics.

    Raises:
        UsageError: An option or a requirement is invalid, or there is nothing to measure.
        ShapeError: The documents do not fit the decoder.
        RyzenError: The candidate is not such a decoder, or the baseline cannot run.
    """
    from ryzen_compile.evaluation import evaluate as evaluation

    _check_seed(seed)
    config = evaluation.EvaluationConfig(
        documents=documents,
        tokens=tokens,
        questions=questions,
        continuations=continuations,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        temperature=temperature,
        chunk_size=chunk_size,
        batch_size=batch_size,
        seed=seed,
    )
    return evaluation.evaluate(
        candidate,
        baseline=baseline,
        data=_path_text(data),
        requirements=requirements,
        config=config.sample() if quick else config,
        graph=graph,
        variant=variant,
        backend=backend,
        statistics=statistics,
        limits=_limits(memory_limit_bytes, time_limit_seconds),
        progress=progress,
    )


@checked
def export(
    model: str | Recipe | tuple[Any, Any],
    output: StrPath | None = None,
    *,
    opset: int | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    max_abs: float | None = None,
    seed: int = 0,
    memory_limit_bytes: int | None = None,
    time_limit_seconds: float | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Export a PyTorch module to an ONNX file that matches the module on samples.

        report = rc.export((module, {"x": x}), "model.onnx", dynamic={"x": {0: "batch"}})

    The graph is compared with the module on its samples and on synthetic inputs of several shapes; if they differ, nothing is
    written.

    Args:
        model: `recipe:NAME`, `hf:FOLDER` for a Hugging Face folder, `FILE.py:FUNCTION` whose function returns a module with its
            inputs or a recipe, a recipe, or (module, inputs) with the inputs as a tuple or a dict of tensors.
        output: The ONNX file to write; None: NAME.onnx in the current folder, for a recipe or a function.
        opset: The ONNX opset; None: that of the recipe, or 23, and 18 if the graph fails there.
        dynamic: The dynamic dimensions of each input, or of all that match `past*`, by axis, `time` or with a range of sizes
            `time:400..16000`; equal names mean equal sizes. A recipe declares its own.
        max_abs: The largest accepted absolute difference of an output, at least 0; None: that of the recipe, else relative to
            the largest magnitude of the output, by element type.
        seed: The seed of the samples, in [0, 2**32 - 1].
        memory_limit_bytes: The maximum memory of the process that runs the models, in bytes; None: what is available.
        time_limit_seconds: The maximum duration of that process, in seconds; None: no limit.
        progress: A listener for stages and diagnostics.

    Raises:
        UsageError: The model, the path or an option is invalid.
        RyzenError: PyTorch cannot export the module, or the file cannot be written.
        AccuracyError: The outputs of the graph differ from those of the module.
    """
    from ryzen_compile import exporter

    _check_seed(seed)
    if max_abs is not None and not max_abs >= 0:
        raise UsageError(f"`max_abs` must be at least 0 (got {max_abs:g})", hint="give the largest accepted difference: 1e-4")
    return exporter.export(
        model,
        output,
        opset=opset,
        dynamic=dynamic,
        max_abs=max_abs,
        seed=seed,
        limits=_limits(memory_limit_bytes, time_limit_seconds),
        progress=progress,
    )


@checked
def export_steps(
    model: str | Recipe | tuple[Any, Any],
    folder: StrPath,
    *,
    passes: str | Sequence[str] | None = None,
    steps: str | Sequence[int | Literal["any"]] = (1, "any"),
    opset: int | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    max_abs: float | None = None,
    data: StrPath | None = None,
    seed: int = 0,
    memory_limit_bytes: int | None = None,
    time_limit_seconds: float | None = None,
    progress: Progress | None = None,
) -> tuple[RewriteResult, ...]:
    """Export a decoder, and write one graph for each step width to a folder, with KV caches of fixed size.

        rc.export_steps("hf:gemma-3-270m", "decode")
        with rc.load(rc.build("decode").path) as engine:
            print(engine.generate("The capital of France is")[0].text)

    Args:
        model: As for `export`; `hf:FOLDER` for a Hugging Face folder.
        folder: The folder to write; its graphs share their states and weights.
        passes: The pipeline, as for `rewrite_steps`; None: `kv-static` with 4,096 tokens, or the positions of the model.
        steps: The tokens per step of each graph, as for `rewrite_steps`.
        opset: As for `export`.
        dynamic: As for `export`.
        max_abs: As for `export`.
        data: Calibration samples for passes that need them, as for `rewrite_steps`.
        seed: The seed of the samples, in [0, 2**32 - 1].
        memory_limit_bytes: As for `export`.
        time_limit_seconds: As for `export`.
        progress: A listener for stages and diagnostics.

    Raises:
        UsageError: The model, the folder or an option is invalid.
        ModelError: The model is not a decoder with KV caches.
        RyzenError: Otherwise as `export` and `rewrite_steps`; nothing is written.
    """
    from ryzen_compile.builder import export_steps as exporter
    from ryzen_compile.builder.rewrite import parse_step_widths
    from ryzen_compile.spec.recipe import Recipe
    from ryzen_compile.torch_module import find_source, suppress_output

    exporter.check_request(Path(folder), _joined(passes))
    with suppress_output():
        source = find_source(model)
    if isinstance(source, Recipe):
        exporter.check_is_decoder(source.name, source.interface)

    def export_to(path: Path) -> ExportReport:
        return export(
            source,
            path,
            opset=opset,
            dynamic=dynamic,
            max_abs=max_abs,
            seed=seed,
            memory_limit_bytes=memory_limit_bytes,
            time_limit_seconds=time_limit_seconds,
            progress=progress,
        )

    widths = parse_step_widths(_joined(steps))
    return exporter.export_steps(
        export_to,
        folder,
        passes=_joined(passes),
        widths=widths,
        data=_path_text(data),
        seed=seed,
        limits=_limits(memory_limit_bytes, time_limit_seconds),
        progress=progress or SilentProgress(),
    )


@checked
def bench(
    candidate: StrPath,
    *,
    against: StrPath | None = None,
    graph: str | None = None,
    variant: str | None = None,
    shapes: Shapes | None = None,
    data: StrPath | None = None,
    warm_up_seconds: float = 0.2,
    seconds: float = 3.0,
    min_iterations: int = 10,
    seed: int = 0,
    memory_limit_bytes: int | None = None,
    time_limit_seconds: float | None = None,
    progress: Progress | None = None,
) -> Timings:
    """Measure the run time of a package or an ONNX file on this machine, alone or in alternation with another.

        timings = rc.bench("model.ryzen", against="model.onnx")
        print(timings.ratio)

    Args:
        candidate: A package (`model.ryzen`, `model.ryzen#GRAPH@VARIANT`) or an ONNX file.
        against: Another package or ONNX file, which runs on the same inputs; None: measure `candidate` alone.
        graph: The graph to time, if a package holds several.
        variant: The name of the variant to time, or a beginning of it; None: the default.
        shapes: The shapes of random inputs; None: the opt shapes of the package.
        data: Samples, of which the first is used: `FILE.npz`, `FILE.py[:FUNCTION]` or `recipe:NAME`; excludes `shapes`.
        warm_up_seconds: The warm-up of each, in seconds, at least 0.
        seconds: The timed duration of each, in seconds, at least 0.
        min_iterations: The minimum number of timed runs of each, at least 1.
        seed: The seed of random inputs, in [0, 2**32 - 1].
        memory_limit_bytes: The maximum memory of the process that runs the models, in bytes; None: what is available.
        time_limit_seconds: The maximum duration of that process, in seconds; None: no limit.
        progress: A listener for diagnostics: what runs, and whether it meets its criteria.

    Raises:
        UsageError: An option is invalid.
        ShapeError: The shapes or samples do not fit.
        RyzenError: A model cannot be loaded.
    """
    from ryzen_compile.runtime import bench as benchmark

    _check_seed(seed)
    config = benchmark.BenchConfig(warm_up_seconds=warm_up_seconds, seconds=seconds, min_iterations=min_iterations)
    return benchmark.bench(
        [os.fspath(model) for model in (candidate, against) if model is not None],
        graph=graph,
        variant=variant,
        shapes=None if shapes is None else _shape_text(shapes),
        data=_path_text(data),
        seed=seed,
        config=config,
        limits=_limits(memory_limit_bytes, time_limit_seconds),
        progress=progress or SilentProgress(),
    )


@checked
def verify(
    package: StrPath,
    *,
    baseline: str | Mapping[str, str] | None = None,
    data: StrPath | None = None,
    criteria: StrPath | None = None,
    seed: int = 0,
    memory_limit_bytes: int | None = None,
    time_limit_seconds: float | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check all digests of a package, compare what can run on this machine, and record the results in the package.

        assert rc.verify("model.ryzen", baseline="model.onnx").met

    Args:
        package: The folder of the package.
        baseline: An ONNX file, `FILE.py:FUNCTION` or `recipe:NAME`; for several graphs, baselines by graph name; None: the
            portable variant.
        data: Samples: `FILE.npz`, a folder of them, `FILE.py[:FUNCTION]` or `recipe:NAME`; None: random values.
        criteria: A success_criteria.toml file; None: the accuracy floor of a lossy variant, otherwise the project's.
        seed: The seed of all random values, in [0, 2**32 - 1].
        memory_limit_bytes: The maximum memory of the process that runs the models, in bytes; None: what is available.
        time_limit_seconds: The maximum duration of that process, in seconds; None: no limit.
        progress: A listener for stages and diagnostics.

    Raises:
        PackageError: The package is damaged.
        UsageError: An option is invalid, or a baseline names no graph.
        AccuracyError: Nothing could be compared.
    """
    from ryzen_compile.numerics import verify as verification

    _check_seed(seed)
    return verification.verify(
        package,
        baseline=baseline,
        data=_path_text(data),
        criteria=criteria,
        seed=seed,
        limits=_limits(memory_limit_bytes, time_limit_seconds),
        progress=progress,
    )


@checked
def inspect(path: StrPath, *, check_digests: bool = False) -> Package:
    """Read a package without loading an engine: graphs, variants, accuracy, engines, provenance and refused targets.

        for engine in rc.inspect("model.ryzen").manifest.engines:
            print(engine.path, engine.targets)

    Args:
        path: The folder of the package.
        check_digests: Whether to verify the sha256 of every file.

    Raises:
        PackageError: The package is damaged, unsafe or from another version.
    """
    from ryzen_compile.artifacts.package.read import read_package

    package = read_package(path)
    if check_digests:
        package.check()
    return package


def _shape_texts(shapes: Shapes | Sequence[Shapes]) -> tuple[str, ...]:
    """Return shapes in trtexec's syntax, one text for each profile."""
    profiles = (shapes,) if isinstance(shapes, (str, Mapping)) else shapes
    return tuple(map(_shape_text, profiles))


def _shape_text(shapes: Shapes) -> str:
    if isinstance(shapes, str):
        return shapes
    return ",".join(f"{_quote_name(name)}:{'x'.join(map(str, sizes))}" for name, sizes in shapes.items())


def _quote_name(name: str) -> str:
    """Return the name of an input as shapes are written: in quotes if it holds a comma or a quote."""
    return f"'{name}'" if '"' in name else f'"{name}"' if "," in name or "'" in name else name


def _option_texts(options: Mapping[str, str | int | float | bool]) -> dict[str, str]:
    """Return builder options as the command line passes them: a flag has an empty value, and one that is False is omitted."""
    return {name: "" if value is True else str(value) for name, value in options.items() if value is not False}


@overload
def _joined(items: str | Sequence[object]) -> str: ...
@overload
def _joined(items: None) -> None: ...
def _joined(items: str | Sequence[object] | None) -> str | None:
    """Return a list as commands take it, comma-separated; a text is returned as it is."""
    return items if items is None or isinstance(items, str) else ",".join(map(str, items))


def _path_text(path: StrPath | None) -> str | None:
    return None if path is None else os.fspath(path)


def _check_seed(seed: int) -> None:
    if not 0 <= seed <= MAX_SEED:
        raise UsageError(f"`seed` must be in [0, {MAX_SEED}] (got {seed})", hint="give a seed that numpy accepts: seed=0")


def _limits(memory_bytes: int | None, seconds: float | None) -> ResourceLimits:
    from ryzen_compile.processes.limits import ResourceLimits

    _check_positive("memory_limit_bytes", memory_bytes)
    _check_positive("time_limit_seconds", seconds)
    return ResourceLimits(memory_bytes=memory_bytes, seconds=seconds)


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise UsageError(f"`{name}` must be greater than 0 (got {value:g})", hint=f"omit `{name}` for no limit")


def _check_choice(name: str, value: str | None, choices: Sequence[str | None]) -> None:
    if value not in choices:
        raise UsageError(f"`{name}` has no value `{value}`", hint=did_you_mean(str(value), [one for one in choices if one]))
