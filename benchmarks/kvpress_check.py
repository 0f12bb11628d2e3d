"""Cross-check of `kv-evict` with kvpress on a real language model: the same kept tokens, and the same perplexity after them.

    pip install kvpress
    python benchmarks/kvpress_check.py FOLDER --text FILE.txt [--context 1024] [--budget 512] [--continuation 128] [--save FILE]

FOLDER is a Hugging Face folder. The attention windows of its layers are made wider than the context, as kvpress evicts from
every layer of such a model. Both read the same `--context` tokens in one step and keep `--budget` tokens of each head: here the
pass `kv-evict{sinks=0,recent-window=1}`, there the press on the caches of Transformers. Then both predict the `--continuation`.

`kv-evict` always keeps the newest token, so the presses score it highest here.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from kvpress import KeyDiffPress, KnormPress
from process import argument_parser, save
from transformers import AutoModelForCausalLM, DynamicCache

import ryzen_compile as rc
from ryzen_compile.builder.rewrite import RewriteConfig, rewrite
from ryzen_compile.evaluation.evaluated_decoder import open_decoder
from ryzen_compile.ir.interface_metadata import interface_of, write_interface
from ryzen_compile.ir.load import load
from ryzen_compile.ir.save import save as save_model
from ryzen_compile.text.tokenizer import TextTokenizer

Array = np.ndarray[Any, Any]

PRESSES = {"knorm": KnormPress, "keydiff": KeyDiffPress}


def main() -> int:
    parser = argument_parser(__doc__, rounds=1)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--continuation", type=int, default=128)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = without_windows(args.folder, work / "model")
        files = {file.name: file.read_bytes() for file in folder.glob("*.json") if "tokenizer" in file.name}
        ids = TextTokenizer(files, source=str(folder)).encode(args.text.read_text(encoding="utf-8")[:40000])
        ids = np.asarray(ids[: args.context + args.continuation], np.int64)[None]
        model = work / "model.onnx"
        rc.export(f"hf:{folder}", work / "exported.onnx")
        graph = load(work / "exported.onnx")
        interface = interface_of(graph)
        sizes = interface.max_sizes | {str(dim): args.context for dim in (interface.input("input_ids").dims or ())[1:]}
        write_interface(graph, msgspec.structs.replace(interface, max_sizes=sizes))
        save_model(graph, model)
        module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        logits, full_keys = continue_module(module, ids, args.context, None)
        results: dict[str, Any] = {"full": {"perplexity": perplexity(logits, ids, args.context)}}
        for score, press_type in PRESSES.items():
            press = keeping_newest(press_type)(compression_ratio=1 - args.budget / args.context)
            logits, pressed = continue_module(module, ids, args.context, press)
            own_logits, kept = continue_rewritten(model, ids, score, args)
            shared = np.mean([shared_tokens(*keys) for keys in zip(kept, pressed, full_keys, strict=True)])
            results[score] = {
                "perplexity": perplexity(own_logits, ids, args.context),
                "kvpress_perplexity": perplexity(logits, ids, args.context),
                "shared_tokens": float(shared),
            }
            print(score, results[score], flush=True)
    save(args.save, {key: getattr(args, key) for key in ("context", "budget", "continuation")} | {"scores": results})
    return 0


def keeping_newest(press_type: Any) -> Any:
    """Return the type of a press that keeps the last token whatever its score."""

    def score(self: Any, *arguments: Any) -> torch.Tensor:
        scores = press_type.score(self, *arguments).clone()
        scores[..., -1] = torch.inf
        return scores

    return type("KeepingNewest", (press_type,), {"score": score})


def without_windows(folder: Path, copy: Path) -> Path:
    """Return a copy of a Hugging Face folder whose attention windows are wider than every context; files are linked."""
    copy.mkdir()
    for file in folder.iterdir():
        if file.name != "config.json":
            (copy / file.name).symlink_to(file.resolve())
    config = json.loads((folder / "config.json").read_text())
    if config.get("sliding_window"):
        config["sliding_window"] = 1 << 16
    (copy / "config.json").write_text(json.dumps(config))
    if not (copy / "tokenizer.json").exists():
        shutil.rmtree(copy)
        raise SystemExit(f"{folder} has no tokenizer.json")
    return copy


def continue_module(module: Any, ids: Array, context: int, press: Any) -> tuple[Array, list[Array]]:
    """Return the logits of the continuation after the caches of the context are pressed, and the keys that are kept."""
    cache, tokens = DynamicCache(), torch.from_numpy(ids)
    with torch.inference_mode():
        module(input_ids=tokens[:, :context], past_key_values=cache, logits_to_keep=1)
        layers = [layer.self_attn for layer in module.model.layers]
        if press is not None:
            for layer, attention in zip(cache.layers, layers, strict=True):
                layer.keys, layer.values = press.compress(attention, None, layer.keys, layer.values, None, {})
        kept = [layer.keys[0].numpy() for layer in cache.layers]
        positions = torch.arange(context, ids.shape[1] - 1)[None]
        output = module(input_ids=tokens[:, context:-1], past_key_values=cache, position_ids=positions)
    return output.logits[0].numpy(), kept


def continue_rewritten(model: Path, ids: Array, score: str, args: Any) -> tuple[Array, list[Array]]:
    """Return the logits of the continuation and the keys in the slots after the context, of the rewritten model."""
    passes = f"kv-static{{capacity={ids.shape[1]}}},kv-evict{{score={score},budget={args.budget},sinks=0,recent-window=1}}"
    path = model.with_name(f"{score}.onnx")
    rewrite(model, path, RewriteConfig(passes=passes))
    with open_decoder(path, graph=None, variant=None, backend=None) as decoder, decoder.engine.session(1) as session:
        session.step(ids[:, : args.context])
        keys = [state.name for state in decoder.engine.interface.states if state.name.endswith(".key")]
        kept = [session.read_state(name)[0] for name in keys]
        return session.step(ids[:, args.context : -1])[0], kept


def perplexity(logits: Array, ids: Array, context: int) -> float:
    """Return the perplexity of the continuation but its first token, given the logits of its tokens but the last."""
    targets = torch.from_numpy(ids[0, context + 1 :])
    return float(torch.nn.functional.cross_entropy(torch.from_numpy(np.array(logits)), targets).exp())


def shared_tokens(keys: Array, other: Array, full: Array) -> float:
    """Return the share of the tokens of `keys` that `other` keeps too; all are (heads, tokens, size), `full` of all tokens."""
    shares = []
    for own, reference, all_keys in zip(keys, other, full, strict=True):
        kept, other_kept = positions_of(own, all_keys), positions_of(reference, all_keys)
        shares.append(len(kept & other_kept) / len(own))
    return float(np.mean(shares))


def positions_of(keys: Array, full: Array) -> set[int]:
    """Return the positions of `keys` among those of all tokens, (tokens, size): each is that of the nearest one."""
    distances = torch.cdist(torch.from_numpy(np.array(keys)), torch.from_numpy(np.array(full)))
    return set(distances.argmin(dim=1).tolist())


if __name__ == "__main__":
    raise SystemExit(main())
