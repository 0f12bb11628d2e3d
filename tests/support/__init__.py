"""Shared test support: small models, reference implementations, fakes, child processes and graph builders."""
