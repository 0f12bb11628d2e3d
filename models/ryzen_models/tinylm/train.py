"""Train tinylm on a CPU in about an hour: `pip install rdata`, then `python -m ryzen_models.tinylm.train --novels Rdata.rdb`.

The novels are from Debian's `r-cran-janeaustenr`: six novels by Jane Austen, 4.5 MB, of which Persuasion is held out. Training
proceeds in stages of increasing length, in bfloat16, with Muon (Jordan et al. 2024) for matrices and AdamW for other weights,
and resumes from its checkpoint. It writes the weights and the held-out excerpt of Persuasion to this folder.
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
"""(document length in bytes, documents per step, steps): 8,192 bytes per step."""

LOSS_WEIGHTS = {documents.PROSE: 1.0, documents.RANDOM: 0.02, documents.ANSWER: 4.0}
"""Label of a byte -> weight of its loss."""

HELD_OUT_TITLE = "Persuasion"
HELD_OUT_BYTES = 120_000
"""Number of bytes, from the end of the held-out novel, that are written to this folder."""


def read_novels(path: Path) -> dict[str, np.ndarray]:
    """Return the bytes of each novel in an R lazy-load database, by title.

    Objects are zlib streams, each preceded by its length. Raises ClickException if the file is not such a database.
    """
    import rdata

    novels, remaining = {}, path.read_bytes()
    while remaining:
        decompressor = zlib.decompressobj()
        data = decompressor.decompress(remaining[4:])
        if struct.unpack(">I", remaining[:4])[0] != len(data):
            raise click.ClickException(f"`{path}` is not an R lazy-load database")
        remaining = decompressor.unused_data
        lines = rdata.conversion.convert(rdata.parser.parse_data(data))
        title = next(str(line) for line in lines if line)
        text = " ".join("\n" if not line else str(line) for line in lines)
        novels[title.title()] = np.frombuffer(text.translate(str.maketrans("", "", "{}<>|")).encode(), np.uint8)
    return novels


def make_batch(prose: np.ndarray, length: int, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids (count, length) int64 and loss weights (count, length) float32 of a step, deterministic for `seed`."""
    rng = np.random.default_rng([SEED, length, seed])
    batch_documents = [documents.training_document(rng, prose, length) for _ in range(count)]
    weights = np.array([LOSS_WEIGHTS[label] for label in sorted(LOSS_WEIGHTS)], np.float32)
    ids = torch.from_numpy(np.stack([document.text for document in batch_documents]).astype(np.int64))
    return ids, torch.from_numpy(weights[np.stack([document.labels for document in batch_documents])])


def learning_rate_factor(step: int, steps: int) -> float:
    """Return the factor of the learning rate: linear warmup over 200 steps, constant, then linear decay over the last third."""
    return min(1.0, (step + 1) / 200, (steps - step) / (steps / 3))


@click.command()
@click.option(
    "--novels", "source", type=click.Path(path_type=Path, exists=True), required=True, help="Rdata.rdb of r-cran-janeaustenr."
)
@click.option("--checkpoint", type=click.Path(path_type=Path), default=Path("out/tinylm.pt"), show_default=True)
@click.option("--threads", type=int, default=2, show_default=True)
def main(source: Path, checkpoint: Path, threads: int) -> None:
    """Train tinylm and write its weights to WEIGHTS."""
    torch.set_num_threads(threads)
    texts = read_novels(source)
    sample = texts[HELD_OUT_TITLE][-HELD_OUT_BYTES:]
    HELD_OUT_TEXT.write_bytes(sample[int(np.flatnonzero(sample == ord("\n"))[0]) + 1 :].tobytes())
    prose = np.concatenate([text for title, text in texts.items() if title != HELD_OUT_TITLE])
    model = build_model()
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.01, momentum=0.95, weight_decay=0.05, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    total = sum(steps for _, _, steps in STAGES)
    completed = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        completed = state["done"]
    started, step = time.monotonic(), 0
    for length, count, steps in STAGES:
        for _ in range(steps):
            step += 1
            if step <= completed:
                continue
            for optimizer, lr in zip(optimizers, base_rates, strict=True):
                optimizer.param_groups[0]["lr"] = lr * learning_rate_factor(step - 1, total)
            ids, weights = make_batch(prose, length, count, step)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(input_ids=ids).logits
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            )
            scale = weights[:, 1:].flatten()
            (losses @ scale / scale.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if step % 50 == 0:
                print_progress(step, total, length, losses.detach(), scale, logits.detach(), ids, started)
            if step % 250 == 0 or step == total:
                checkpoint.parent.mkdir(parents=True, exist_ok=True)
                partial_path = checkpoint.with_suffix(".part")
                torch.save(
                    {
                        "model": model.state_dict(),
                        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                        "done": step,
                    },
                    partial_path,
                )
                partial_path.replace(checkpoint)
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
    """Print the bits per byte of prose and the fraction of answer bytes predicted correctly."""
    prose, answer = loss_weights == LOSS_WEIGHTS[documents.PROSE], loss_weights == LOSS_WEIGHTS[documents.ANSWER]
    correct = (logits[:, :-1].argmax(-1) == ids[:, 1:]).flatten()[answer].float().mean()
    bits, seconds = losses[prose].mean() / np.log(2), time.monotonic() - started
    click.echo(f"{step}/{total} length {length}: {bits:.3f} bits per byte, answers correct {correct:.3f}, {seconds:.0f} s")


if __name__ == "__main__":
    main()
