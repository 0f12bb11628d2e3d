"""The workings of the pass precision."""
