"""Numerics: compare a candidate (engine, graph or module) with a baseline over a grid of shapes, and check the differences."""
