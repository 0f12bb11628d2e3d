"""Engine packages: `model.ryzen/`, a folder with graphs, weights, engines and a manifest of all files."""
