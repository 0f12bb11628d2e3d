"""The orchestrator: which passes go together, in which order, and whether each kept its word."""
