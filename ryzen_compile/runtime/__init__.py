"""Run time: a package made ready on this machine."""
