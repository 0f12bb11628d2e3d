"""Parse, configure, build: what TensorRT and TensorRT for RTX do alike, in the child process that does it."""

from __future__ import annotations

import hashlib
import threading
from typing import Any, ClassVar

from ryzen_compile.backends import builder_options, engine_layers
from ryzen_compile.backends.api import Layers, Request
from ryzen_compile.backends.builder_option_values import Settings
from ryzen_compile.backends.nvinfer.backend import NvinferBackend
from ryzen_compile.backends.nvinfer.build_errors import no_values, not_built, not_configured, not_parsed
from ryzen_compile.backends.nvinfer.builder_log import Log
from ryzen_compile.backends.process.crash_breadcrumb import Chatter, Recorder
from ryzen_compile.backends.process.protocol import Done
from ryzen_compile.errors import BackendError
from ryzen_compile.spec.target import detect

_WRITE_BYTES = 1 << 26


class NvinferBuilder:
    """The builder of one library; a subclass says how the library aims at its targets."""

    backend: ClassVar[NvinferBackend]

    def __init__(self) -> None:
        """Load the library; raises BackendError where it cannot be."""
        self.trt = self.backend.load()
        self.version = str(self.trt.__version__)

    def aim(self, config: Any, request: Request) -> None:
        """Set what to build for; what the library then says against it is told by the caller."""

    def built(self, config: Any, request: Request) -> None:
        """Keep what the build has learnt."""

    def build(self, request: Request, output: str, recorder: Recorder, chatter: Chatter) -> Done:
        """Build the request's graph into `output`; raises BackendError that names the node when it can be known."""
        log = Log(self.trt, recorder)
        builder = self.trt.Builder(log.logger)
        network = builder.create_network(0)
        parser = self.trt.OnnxParser(network, log.logger)
        config = builder.create_builder_config()
        self._configure(parser, config, request)
        if log.errors:
            raise not_configured(f"{self.backend.product} {self.version}", log, chatter)
        recorder.note(f"reading `{request.graph}`")
        if not parser.parse_from_file(request.graph):
            raise not_parsed(self.backend.product, request.graph, parser, log, chatter)
        for profile in self._profiles(builder, network, request):
            config.add_optimization_profile(profile)
        recorder.note("building the engine")
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise not_built(self.backend.product, log, chatter)
        self.built(config, request)
        recorder.note(f"writing `{output}`")
        sha256, size_bytes = write(plan, output)
        report = self._inspect(plan, request, log) or log.layers
        return Done(sha256=sha256, size_bytes=size_bytes, layers=report, warnings=log.warnings())

    def _configure(self, parser: Any, config: Any, request: Request) -> None:
        config.profiling_verbosity = self.trt.ProfilingVerbosity.DETAILED
        builder_options.apply(request.options, Settings(self.trt, parser, config))
        self.aim(config, request)

    def _profiles(self, builder: Any, network: Any, request: Request) -> list[Any]:
        profiles = request.profiles
        inputs = [network.get_input(at) for at in range(network.num_inputs)]
        made = [builder.create_optimization_profile() for _ in profiles]
        for tensor in inputs:
            name = tensor.name
            if tensor.is_shape_tensor:
                raise no_values(self.backend.product, request.graph, name)
            if -1 not in tuple(tensor.shape):
                continue
            if not profiles or any(name not in profile.min for profile in profiles):
                raise BackendError(f"the input `{name}` has a dynamic shape, and no profile says how large it may be")
            for ours, its in zip(profiles, made, strict=True):
                its.set_shape(name, ours.min[name], ours.opt[name], ours.max[name])
        return made

    def _inspect(self, plan: Any, request: Request, log: Log) -> Layers | None:
        """Ask the engine itself about its layers, where a GPU that it is for is here to load it."""
        if not {gpu.sm for gpu in detect()} & {target.sm for target in request.targets}:
            return None
        engine = self.trt.Runtime(log.logger).deserialize_cuda_engine(plan)
        if engine is None:
            return None
        inspector = engine.create_engine_inspector()
        text = inspector.get_engine_information(self.trt.LayerInformationFormat.JSON)
        return engine_layers.from_inspector(text, log.attentions)


def write(plan: Any, path: str) -> tuple[str, int]:
    """Write the plan from the library's own memory while it is being hashed; returns its sha256 and its size in bytes."""
    view = memoryview(plan).cast("B")
    digest = hashlib.sha256()
    hashing = threading.Thread(target=digest.update, args=(view,))
    hashing.start()
    try:
        with open(path, "wb", buffering=0) as file:
            at = 0
            while at < len(view):
                at += file.write(view[at : at + _WRITE_BYTES])
    finally:
        hashing.join()
    return digest.hexdigest(), len(view)
