"""Recognition of decoders: finds the attention layers of a graph, their KV caches, masks, positions and rotations.

Attention is matched by structure. Masks, positions and rotary embeddings are identified by probing: the part of the graph that
computes them is run on small inputs, and the results are compared with the expected pattern.
"""
