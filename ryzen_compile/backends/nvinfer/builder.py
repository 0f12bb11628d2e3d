"""Parse, configure, build: what TensorRT and TensorRT for RTX do alike, in the child process that does it."""

from __future__ import annotations

import hashlib
import threading
from typing import Any, ClassVar

from ryzen_compile.backends import builder_options, engine_layers
from ryzen_compile.backends.api import BuildRequest, EngineLayers
from ryzen_compile.backends.builder_option_values import BuilderHandles
from ryzen_compile.backends.nvinfer.backend import NvinferBackend
from ryzen_compile.backends.nvinfer.build_errors import build_error, config_error, parse_error, shape_tensor_error
from ryzen_compile.backends.nvinfer.builder_log import BuilderLog
from ryzen_compile.backends.process.crash_breadcrumb import ChildOutput, CrashBreadcrumb
from ryzen_compile.backends.process.protocol import BuildDone
from ryzen_compile.errors import BackendError
from ryzen_compile.spec.target import detect_gpus

_WRITE_CHUNK_BYTES = 1 << 26


class NvinferBuilder:
    """The builder of one library; a subclass says how the library aims at its targets."""

    backend: ClassVar[NvinferBackend]

    def __init__(self) -> None:
        """Load the library; raises BackendError where it cannot be."""
        self.trt = self.backend.load_bindings()
        self.version = str(self.trt.__version__)

    def configure_targets(self, config: Any, request: BuildRequest) -> None:
        """Set what to build for; what the library then says against it is told by the caller."""

    def after_build(self, config: Any, request: BuildRequest) -> None:
        """Keep what the build has learnt."""

    def build(self, request: BuildRequest, output: str, breadcrumb: CrashBreadcrumb, child_output: ChildOutput) -> BuildDone:
        """Build the request's graph into `output`; raises BackendError that names the node when it can be known."""
        log = BuilderLog(self.trt, breadcrumb)
        builder = self.trt.Builder(log.logger)
        network = builder.create_network(0)
        parser = self.trt.OnnxParser(network, log.logger)
        config = builder.create_builder_config()
        self._configure(parser, config, request)
        if log.errors:
            raise config_error(f"{self.backend.product} {self.version}", log, child_output)
        breadcrumb.write(f"reading `{request.onnx_path}`")
        if not parser.parse_from_file(request.onnx_path):
            raise parse_error(self.backend.product, request.onnx_path, parser, log, child_output)
        for profile in self._optimization_profiles(builder, network, request):
            config.add_optimization_profile(profile)
        breadcrumb.write("building the engine")
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise build_error(self.backend.product, log, child_output)
        self.after_build(config, request)
        breadcrumb.write(f"writing `{output}`")
        sha256, size_bytes = write_plan(plan, output)
        report = self._inspect_layers(plan, request, log) or log.layers
        return BuildDone(sha256=sha256, size_bytes=size_bytes, layers=report, warnings=log.warnings())

    def _configure(self, parser: Any, config: Any, request: BuildRequest) -> None:
        config.profiling_verbosity = self.trt.ProfilingVerbosity.DETAILED
        builder_options.apply_options(request.options, BuilderHandles(self.trt, parser, config))
        self.configure_targets(config, request)

    def _optimization_profiles(self, builder: Any, network: Any, request: BuildRequest) -> list[Any]:
        profiles = request.profiles
        inputs = [network.get_input(at) for at in range(network.num_inputs)]
        made = [builder.create_optimization_profile() for _ in profiles]
        for tensor in inputs:
            name = tensor.name
            if tensor.is_shape_tensor:
                raise shape_tensor_error(self.backend.product, request.onnx_path, name)
            if -1 not in tuple(tensor.shape):
                continue
            if not profiles or any(name not in profile.min for profile in profiles):
                raise BackendError(f"the input `{name}` has a dynamic shape, and no profile says how large it may be")
            for ours, its in zip(profiles, made, strict=True):
                its.set_shape(name, ours.min[name], ours.opt[name], ours.max[name])
        return made

    def _inspect_layers(self, plan: Any, request: BuildRequest, log: BuilderLog) -> EngineLayers | None:
        """Ask the engine itself about its layers, where a GPU that it is for is here to load it."""
        if not {gpu.sm for gpu in detect_gpus()} & {target.sm for target in request.targets}:
            return None
        engine = self.trt.Runtime(log.logger).deserialize_cuda_engine(plan)
        if engine is None:
            return None
        inspector = engine.create_engine_inspector()
        text = inspector.get_engine_information(self.trt.LayerInformationFormat.JSON)
        return engine_layers.from_inspector(text, log.attentions)


def write_plan(plan: Any, path: str) -> tuple[str, int]:
    """Write the plan from the library's own memory while it is being hashed; returns its sha256 and its size in bytes."""
    view = memoryview(plan).cast("B")
    digest = hashlib.sha256()
    hashing = threading.Thread(target=digest.update, args=(view,))
    hashing.start()
    try:
        with open(path, "wb", buffering=0) as file:
            at = 0
            while at < len(view):
                at += file.write(view[at : at + _WRITE_CHUNK_BYTES])
    finally:
        hashing.join()
    return digest.hexdigest(), len(view)
