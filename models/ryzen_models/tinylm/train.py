"""Train tinylm on a CPU, an hour: `pip install rdata`, then `python -m ryzen_models.tinylm.train --novels Rdata.rdb`.

The novels come from Debian's `r-cran-janeaustenr`: six by Jane Austen, 4.5 MB, of which Persuasion is held out. Training is in
stages of growing length, in bfloat16, by Muon (Jordan et al. 2024) for matrices and AdamW for the rest, and goes on from its
checkpoint where it was stopped. It writes the weights and the sample of Persuasion that lie beside this file.
"""

from __future__ import annotations

import struct
import time
import zlib
from pathlib import Path

import click
import numpy as np
import torch

from ryzen_models.tinylm import documents
from ryzen_models.tinylm.model import SEED, build_model, save_weights
from ryzen_models.tinylm.questions import HELD_OUT_TEXT

STAGES = ((128, 64, 600), (256, 32, 700), (512, 16, 700), (1024, 8, 1200), (2048, 4, 800))
"""(length, documents a step, steps): 8,192 bytes each step."""

LOSS_WEIGHTS = {documents.PROSE: 1.0, documents.RANDOM: 0.02, documents.ANSWER: 4.0}
"""How much a byte's loss counts."""

HELD_OUT_TITLE = "Persuasion"
HELD_OUT_BYTES = 120_000
"""How many bytes of it, the last, lie beside this file."""


def read_novels(path: Path) -> dict[str, np.ndarray]:
    """Return the bytes of each novel in R's lazy-load database, by its title: objects are zlib streams behind their length."""
    import rdata

    found, rest = {}, path.read_bytes()
    while rest:
        unpack = zlib.decompressobj()
        packed = unpack.decompress(rest[4:])
        if struct.unpack(">I", rest[:4])[0] != len(packed):
            raise click.ClickException(f"`{path}` is not an R lazy-load database")
        rest = unpack.unused_data
        lines = rdata.conversion.convert(rdata.parser.parse_data(packed))
        title = next(str(line) for line in lines if line)
        text = " ".join("\n" if not line else str(line) for line in lines)
        found[title.title()] = np.frombuffer(text.translate(str.maketrans("", "", "{}<>|")).encode(), np.uint8)
    return found


def make_batch(prose: np.ndarray, length: int, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids (count, length) int64 and weights of each byte's loss (count, length) fp32 for the step seeded by `seed`."""
    chance = np.random.default_rng([SEED, length, seed])
    made = [documents.training_document(chance, prose, length) for _ in range(count)]
    weights = np.array([LOSS_WEIGHTS[kind] for kind in sorted(LOSS_WEIGHTS)], np.float32)
    ids = torch.from_numpy(np.stack([one.text for one in made]).astype(np.int64))
    return ids, torch.from_numpy(weights[np.stack([one.labels for one in made])])


def learning_rate_factor(step: int, steps: int) -> float:
    """Return the share of the full learning rate: up over 200 steps, then level, then down to 0 over the last third."""
    return min(1.0, (step + 1) / 200, (steps - step) / (steps / 3))


@click.command()
@click.option(
    "--novels", "source", type=click.Path(path_type=Path, exists=True), required=True, help="Rdata.rdb of r-cran-janeaustenr."
)
@click.option("--checkpoint", type=click.Path(path_type=Path), default=Path("out/tinylm.pt"), show_default=True)
@click.option("--threads", type=int, default=2, show_default=True)
def main(source: Path, checkpoint: Path, threads: int) -> None:
    """Train, and write the weights next to this file."""
    torch.set_num_threads(threads)
    texts = read_novels(source)
    sample = texts[HELD_OUT_TITLE][-HELD_OUT_BYTES:]
    HELD_OUT_TEXT.write_bytes(sample[int(np.flatnonzero(sample == ord("\n"))[0]) + 1 :].tobytes())
    prose = np.concatenate([text for title, text in texts.items() if title != HELD_OUT_TITLE])
    model = build_model()
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    optimisers = [
        torch.optim.Muon(matrices, lr=0.01, momentum=0.95, weight_decay=0.05, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    full = [optimiser.param_groups[0]["lr"] for optimiser in optimisers]
    total = sum(steps for _, _, steps in STAGES)
    done = 0
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(kept["model"])
        for optimiser, state in zip(optimisers, kept["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        done = kept["done"]
    begun, at = time.monotonic(), 0
    for length, count, steps in STAGES:
        for _ in range(steps):
            at += 1
            if at <= done:
                continue
            for optimiser, lr in zip(optimisers, full, strict=True):
                optimiser.param_groups[0]["lr"] = lr * learning_rate_factor(at - 1, total)
            ids, weights = make_batch(prose, length, count, at)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(input_ids=ids).logits
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            )
            scale = weights[:, 1:].flatten()
            (losses @ scale / scale.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
            if at % 50 == 0:
                print_progress(at, total, length, losses.detach(), scale, logits.detach(), ids, begun)
            if at % 250 == 0 or at == total:
                checkpoint.parent.mkdir(parents=True, exist_ok=True)
                part = checkpoint.with_suffix(".part")
                torch.save(
                    {"model": model.state_dict(), "optimisers": [one.state_dict() for one in optimisers], "done": at}, part
                )
                part.replace(checkpoint)
    save_weights(model)


def print_progress(
    step: int,
    total: int,
    length: int,
    losses: torch.Tensor,
    loss_weights: torch.Tensor,
    logits: torch.Tensor,
    ids: torch.Tensor,
    started: float,
) -> None:
    """Print bits per byte of prose, and the share of answer bytes that come first."""
    prose, answer = loss_weights == LOSS_WEIGHTS[documents.PROSE], loss_weights == LOSS_WEIGHTS[documents.ANSWER]
    right = (logits[:, :-1].argmax(-1) == ids[:, 1:]).flatten()[answer].float().mean()
    bits, seconds = losses[prose].mean() / np.log(2), time.monotonic() - started
    click.echo(f"{step}/{total} length {length}: {bits:.3f} bits a byte, answers {right:.3f}, {seconds:.0f} s")


if __name__ == "__main__":
    main()
