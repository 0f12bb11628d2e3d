"""The main job: a model in, a package out."""
