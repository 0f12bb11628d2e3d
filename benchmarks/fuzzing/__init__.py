"""Fuzzing of the command line: hostile inputs by class, and a runner that judges what a command did with them.

`models`, `packages`, `samples` and `commands` make the cases of one class each; `runner` runs a case in a forked process.
"""
