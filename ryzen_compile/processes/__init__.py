"""Child processes with limits on time and memory: a hang, a crash or a lack of memory becomes one error of the parent."""
