"""Hugging Face folders as recipes: `hf:FOLDER` is the module, the interface and the samples of the model in a folder.

`hf:FOLDER` names a folder with `config.json`, weights in safetensors and a tokenizer, or a folder with one GGUF file;
`hf:FILE.gguf` names the file. The task follows from the configuration; `hf:FOLDER#TASK` selects another one.
"""

from ryzen_compile.huggingface.recipes import make_recipe, recipe_digest

__all__ = ["make_recipe", "members", "recipe_digest"]


def members() -> dict[str, str]:
    """Return the recipe sources of this package: {prefix of the reference: module}."""
    return {"hf": "ryzen_compile.huggingface"}
