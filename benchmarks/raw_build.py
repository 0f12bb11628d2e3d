"""Raw build, the reference for `build_overhead.py`: parse one file and build a plan with TensorRT-RTX directly.

    python benchmarks/raw_build.py MODEL.onnx OUT.plan SM86,SM89,SM120 MIN OPT MAX

MIN, OPT and MAX are shapes in the syntax of trtexec; `-` for a model without dynamic dimensions.
"""

from __future__ import annotations

import sys

import tensorrt_rtx_bindings as trt


def main() -> None:
    model, output, targets, *shapes = sys.argv[1:]
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(model):
        sys.exit("; ".join(str(parser.get_error(index)) for index in range(parser.num_errors)))
    config = builder.create_builder_config()
    names = targets.split(",")
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    if shapes[0] != "-":
        profile = builder.create_optimization_profile()
        by_input = [dict(part.split(":") for part in text.split(",")) for text in shapes]
        for name in by_input[0]:
            profile.set_shape(name, *(tuple(map(int, sizes[name].split("x"))) for sizes in by_input))
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        sys.exit("the builder returned nothing")
    with open(output, "wb") as file:
        file.write(plan)


if __name__ == "__main__":
    main()
