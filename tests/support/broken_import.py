"""A module that cannot be imported, as a library with a wrong binary interface."""

raise RuntimeError("the binary interface differs")
