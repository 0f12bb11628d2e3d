"""Analyses of a graph: element types, sizes, input roles, states. None of them changes the graph."""
