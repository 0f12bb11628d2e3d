"""Loading of samples by the value of `--data`: FILE.npz, a folder, FILE.py[:FUNCTION], recipe:NAME or hf:FOLDER."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ryzen_compile import registry
from ryzen_compile.errors import UsageError
from ryzen_compile.utils.user_script import is_script_reference

if TYPE_CHECKING:
    from ryzen_compile.data.sources import Samples
    from ryzen_compile.spec.interface import Interface


def load_samples(text: str, interface: Interface, *, seed: int) -> Samples:
    """Return the samples that `text` names, validated against `interface` when they are read.

    `seed` is passed to a recipe. Raises UsageError if `text` has none of the supported forms.
    """
    from ryzen_compile.data.sources import from_npz, from_recipe, from_script

    if registry.is_recipe_reference(text):
        return from_recipe(registry.find_recipe(text), seed=seed)
    if is_script_reference(text):
        return from_script(text, interface)
    if Path(text).suffix == ".npz" or Path(text).is_dir():
        return from_npz(text, interface)
    raise UsageError(
        f"`{text}` names no samples", hint="give FILE.npz, a folder of .npz files, FILE.py[:FUNCTION], recipe:NAME or hf:FOLDER"
    )


def samples_digest(text: str | None, interfaces: Iterable[Interface], *, seed: int) -> str:
    """Return a text that identifies the samples that `text` names for `interfaces`, for use in cache keys.

    The text contains the seed and a digest of file contents, of the samples that a script returns, or of a recipe's modules and
    data files. Raises the same errors as reading the samples.
    """
    if text is None:
        return f"seeded, seed {seed}"
    import blake3

    digest = blake3.blake3()
    if registry.is_recipe_reference(text):
        digest.update(registry.recipe_digest(text).encode())
    elif is_script_reference(text):
        for interface in interfaces:
            for sample in load_samples(text, interface, seed=seed):
                for name, array in sorted(sample.items()):
                    digest.update(f"{name} {array.dtype} {array.shape} ".encode())
                    digest.update(array.tobytes())
    else:
        for file in _npz_files(Path(text)):
            digest.update(file.read_bytes())
    return f"{digest.hexdigest()[:16]}, seed {seed}"


def _npz_files(path: Path) -> Iterable[Path]:
    return sorted(path.glob("*.npz")) if path.is_dir() else [path] if path.is_file() else []
