"""Print the contents of NVIDIA's bindings as JSON: the attributes of all classes, and the builder options that fail."""

from __future__ import annotations

import importlib
import json
import sys
from unittest.mock import create_autospec

from ryzen_compile.backends.builder_option_values import BuilderHandles
from ryzen_compile.backends.builder_options import OPTIONS

EXAMPLES = {
    "memPoolSize": ["workspace:1", "tacticSharedMem:1"],
    "tacticSources": ["-JIT_CONVOLUTIONS", "+EDGE_MASK_CONVOLUTIONS"],
    "preview": ["+aliasedPluginIO1003", "-runtimeActivationResize"],
    "hardwareCompatibilityLevel": "ampere+",
    "tilingOptimizationLevel": "3",
    "profilingVerbosity": "detailed",
    "sparsity": "enable",
    "staticPlugins": [],
    "dynamicPlugins": [],
}


def main(module: str) -> None:
    trt = importlib.import_module(module)
    failed = {}
    for option in OPTIONS:
        config = create_autospec(trt.IBuilderConfig, instance=True, spec_set=True)
        config.get_tactic_sources.return_value = 3
        parser = create_autospec(trt.OnnxParser, instance=True, spec_set=True)
        try:
            option.apply(BuilderHandles(trt, parser, config), EXAMPLES.get(option.name, 1))
        except AttributeError as error:
            failed[option.name] = str(error)
    classes = {name: dir(value) for name, value in vars(trt).items() if isinstance(value, type)}
    sys.stdout.write(json.dumps({"module": dir(trt), "classes": classes, "failed": failed}))


if __name__ == "__main__":
    main(sys.argv[1])
