"""What a user would write instead: TensorRT-RTX's parser and builder on one file, and the plan written to another.

    python benchmarks/raw_build.py MODEL.onnx OUT.plan SM86,SM89,SM120 MIN OPT MAX

MIN, OPT and MAX are shapes as trtexec spells them; `-` for a model without dynamic dimensions.
"""

from __future__ import annotations

import sys

import tensorrt_rtx_bindings as trt


def main() -> None:
    model, out, targets, *sides = sys.argv[1:]
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(model):
        sys.exit("; ".join(str(parser.get_error(at)) for at in range(parser.num_errors)))
    config = builder.create_builder_config()
    names = targets.split(",")
    config.num_compute_capabilities = len(names)
    for at, name in enumerate(names):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), at)
    if sides[0] != "-":
        profile = builder.create_optimization_profile()
        ranges = [dict(part.split(":") for part in side.split(",")) for side in sides]
        for name in ranges[0]:
            profile.set_shape(name, *(tuple(map(int, side[name].split("x"))) for side in ranges))
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        sys.exit("the builder returned nothing")
    with open(out, "wb") as file:
        file.write(plan)


if __name__ == "__main__":
    main()
