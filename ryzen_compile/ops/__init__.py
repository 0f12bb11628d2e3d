"""Custom ops: whether their implementations agree, and what of that was verified on this machine."""
