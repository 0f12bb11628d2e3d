"""Packages: `model.ryzen/`, a folder of graphs, engines and evidence under one manifest."""
