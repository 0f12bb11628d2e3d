"""Child processes that builds run in: bounded in memory and time, stopped with their parent."""
