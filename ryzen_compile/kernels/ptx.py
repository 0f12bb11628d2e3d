"""Post-processing of Triton's PTX for TensorRT: removal of undeclared kernel parameters.

Triton appends pointers to scratch memory to the parameters of every kernel. TensorRT cannot pass them, so they are removed
after checking that the kernel does not read them.
"""

from __future__ import annotations

import re

_ENTRY = re.compile(r"\.visible\s+\.entry\s+(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)")


def drop_hidden_parameters(ptx: str, count: int) -> tuple[str, int]:
    """Remove all but the first `count` parameters of the only entry of `ptx`; return the PTX and the number removed.

    Raises ValueError if there is not exactly one entry, if it has fewer parameters, or if it reads a removed parameter.
    """
    entries = [*_ENTRY.finditer(ptx)]
    if len(entries) != 1:
        raise ValueError(f"the PTX has {len(entries)} entries, expected one")
    (entry,) = entries
    parameters = [line.strip() for line in entry["parameters"].split(",") if line.strip()]
    if len(parameters) < count:
        raise ValueError(f"`{entry['name']}` has {len(parameters)} parameters, but {count} were declared")
    body = ptx[: entry.start()] + ptx[entry.end() :]
    for hidden in parameters[count:]:
        name = hidden.split()[-1]
        if re.search(rf"(?<![\w$]){re.escape(name)}(?![\w$])", body):
            raise ValueError(f"`{entry['name']}` reads its hidden parameter `{name}`: it needs scratch memory")
    declared = ",\n".join(f"\t{line}" for line in parameters[:count])
    declaration = f".visible .entry {entry['name']}(\n{declared}\n)"
    return ptx[: entry.start()] + declaration + ptx[entry.end() :], len(parameters) - count
