"""`NvinferBuilder`: parse, configure and build in the child process, common to TensorRT and TensorRT-RTX."""

from __future__ import annotations

import hashlib
import threading
from typing import Any, ClassVar

from ryzen_compile.backends import builder_options, engine_layers
from ryzen_compile.backends.api import BuildRequest, EngineLayers
from ryzen_compile.backends.builder_option_values import BuilderHandles
from ryzen_compile.backends.nvinfer.base_backend import NvinferBackend
from ryzen_compile.backends.nvinfer.build_errors import build_error, config_error, parse_error, shape_tensor_error
from ryzen_compile.backends.nvinfer.builder_log import BuilderLog
from ryzen_compile.backends.process.protocol import BuildDone
from ryzen_compile.errors import BackendError
from ryzen_compile.processes.crash_breadcrumb import ChildOutput, CrashBreadcrumb
from ryzen_compile.spec.target import detect_gpus

_WRITE_CHUNK_BYTES = 1 << 26


class NvinferBuilder:
    """The builder of one library; a subclass configures the targets of its library."""

    backend: ClassVar[NvinferBackend]

    def __init__(self) -> None:
        """Load the library. Raises BackendError if it cannot be loaded."""
        self.trt = self.backend.load_bindings()
        self.version = str(self.trt.__version__)

    def configure_targets(self, config: Any, request: BuildRequest) -> None:
        """Set the targets of `request` in `config`; the caller reports errors that the library logs meanwhile."""

    def after_build(self, config: Any, request: BuildRequest) -> None:
        """Save what the build measured; called after every successful build."""

    def build(self, request: BuildRequest, output: str, breadcrumb: CrashBreadcrumb, child_output: ChildOutput) -> BuildDone:
        """Build the graph of `request` into `output`. Raises BackendError, which names the failing node if it is known."""
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
        for optimization_profile in self._optimization_profiles(builder, network, request):
            config.add_optimization_profile(optimization_profile)
        breadcrumb.write("building the engine")
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise build_error(self.backend.product, log, child_output)
        self.after_build(config, request)
        breadcrumb.write(f"writing `{output}`")
        sha256, size_bytes = write_plan(plan, output)
        layers = self._inspect_layers(plan, request, log) or log.layers
        return BuildDone(sha256=sha256, size_bytes=size_bytes, layers=layers, warnings=log.warnings())

    def _configure(self, parser: Any, config: Any, request: BuildRequest) -> None:
        config.profiling_verbosity = self.trt.ProfilingVerbosity.DETAILED
        builder_options.apply_options(request.options, BuilderHandles(self.trt, parser, config))
        self.configure_targets(config, request)

    def _optimization_profiles(self, builder: Any, network: Any, request: BuildRequest) -> list[Any]:
        profiles = request.profiles
        optimization_profiles = [builder.create_optimization_profile() for _ in profiles]
        for tensor in [network.get_input(index) for index in range(network.num_inputs)]:
            name = tensor.name
            if tensor.is_shape_tensor:
                raise shape_tensor_error(self.backend.product, request.onnx_path, name)
            if -1 not in tuple(tensor.shape):
                continue
            if not profiles or any(name not in profile.min for profile in profiles):
                raise BackendError(
                    f"the input `{name}` has a dynamic shape, and no profile specifies its range", may_be_one_target=False
                )
            for profile, optimization_profile in zip(profiles, optimization_profiles, strict=True):
                optimization_profile.set_shape(name, profile.min[name], profile.opt[name], profile.max[name])
        return optimization_profiles

    def _inspect_layers(self, plan: Any, request: BuildRequest, log: BuilderLog) -> EngineLayers | None:
        """Return the layers reported by the engine itself; None if no GPU of this machine can load it."""
        if not {gpu.sm for gpu in detect_gpus()} & {target.sm for target in request.targets}:
            return None
        engine = self.trt.Runtime(log.logger).deserialize_cuda_engine(plan)
        if engine is None:
            return None
        inspector = engine.create_engine_inspector()
        text = inspector.get_engine_information(self.trt.LayerInformationFormat.JSON)
        return engine_layers.from_inspector(text, log.attentions)


def write_plan(plan: Any, path: str) -> tuple[str, int]:
    """Write the plan directly from the library's memory, hashing it in parallel; return its sha256 and its size in bytes."""
    view = memoryview(plan).cast("B")
    digest = hashlib.sha256()
    hash_thread = threading.Thread(target=digest.update, args=(view,))
    hash_thread.start()
    try:
        with open(path, "wb", buffering=0) as file:
            offset = 0
            while offset < len(view):
                offset += file.write(view[offset : offset + _WRITE_CHUNK_BYTES])
    finally:
        hash_thread.join()
    return digest.hexdigest(), len(view)
