"""Specifications: interfaces, KV caches, targets, profiles, element types, properties, passes, ops and recipes.

Importing these modules does not import torch, onnx_ir or a runtime.
"""
