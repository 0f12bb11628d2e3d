"""Verification of custom ops: comparison of their implementations, and records of the checks done on this machine."""
