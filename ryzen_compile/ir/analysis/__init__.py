"""Read-only analyses of a graph: constants, op traits, element types, sizes, dims, input roles and states."""
