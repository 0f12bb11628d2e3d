"""PTX as TensorRT can launch it: with the declared parameters and no others.

Triton appends pointers to scratch memory to the parameters of every kernel. A launch by TensorRT has nothing to give for
them; they go, once it is shown that the kernel never reads them.
"""

from __future__ import annotations

import re

_ENTRY = re.compile(r"\.visible\s+\.entry\s+(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)")


def drop_hidden_parameters(ptx: str, count: int) -> tuple[str, int]:
    """Return `ptx` with the first `count` parameters of its only entry, and how many came after them.

    Raises ValueError where the entry cannot be found, has fewer parameters, or reads one that would go.
    """
    entries = [*_ENTRY.finditer(ptx)]
    if len(entries) != 1:
        raise ValueError(f"the PTX has {len(entries)} entries, not one")
    (entry,) = entries
    parameters = [line.strip() for line in entry["parameters"].split(",") if line.strip()]
    if len(parameters) < count:
        raise ValueError(f"`{entry['name']}` has {len(parameters)} parameters, and {count} were declared")
    body = ptx[: entry.start()] + ptx[entry.end() :]
    for hidden in parameters[count:]:
        name = hidden.split()[-1]
        if re.search(rf"(?<![\w$]){re.escape(name)}(?![\w$])", body):
            raise ValueError(f"`{entry['name']}` reads its hidden parameter `{name}`: it needs scratch memory")
    listed = ",\n".join(f"\t{line}" for line in parameters[:count])
    kept = f".visible .entry {entry['name']}(\n{listed}\n)"
    return ptx[: entry.start()] + kept + ptx[entry.end() :], len(parameters) - count
