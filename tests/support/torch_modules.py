"""PyTorch modules to export: valid ones, and one for each way in which an export fails."""

from __future__ import annotations

from typing import Any

import torch

from ryzen_compile.spec.interface import InputSpec, Interface, TensorSpec
from ryzen_compile.spec.recipe import Recipe


class Tagger(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(50, 8)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.table(input_ids) * attention_mask[..., None]
        return {"logits": self.head(hidden), "pooled": hidden.sum(1)}


def tagger() -> Any:
    torch.manual_seed(0)
    return Tagger(), (torch.randint(0, 50, (2, 6)), torch.ones(2, 6, dtype=torch.int64))


def tagger_by_name() -> Any:
    module, (ids, mask) = tagger()
    return module, {"input_ids": ids, "attention_mask": mask}


class DoublingModule(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def module_alone() -> Any:
    return DoublingModule()


class InconsistentExport(torch.nn.Module):
    """Computes other outputs during export than in a normal run."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if torch.onnx.is_in_onnx_export() else x * 3


def inconsistent() -> Any:
    return InconsistentExport(), torch.rand(2, 6)


class DataDependentBranch(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x * 2
        return x - 1


def branching() -> Any:
    return DataDependentBranch(), (torch.ones(2, 3),)


class DynamoUnsupported(torch.nn.Module):
    """Fails in torch.export, but not in the tracer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            raise NotImplementedError("not by torch.export")
        return x * 2


def untraceable() -> Any:
    return DynamoUnsupported(), (torch.rand(2, 3),)


class UnsupportedOp(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


def bessel() -> Any:
    return UnsupportedOp(), (torch.rand(2, 3),)


class FixedReshape(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, 6) + 1


def fixing() -> Any:
    return FixedReshape(), (torch.rand(2, 6),)


class TwoInputs(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


def joined_by_name() -> Any:
    return TwoInputs(), {"x": torch.rand(2, 6), "y": torch.rand(2, 6)}


class VariadicInputs(torch.nn.Module):
    def forward(self, first: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (first + sum(rest), *rest)


RECIPE = Recipe(
    name="pair",
    description="adds tensors",
    make_module=VariadicInputs,
    interface=Interface(
        inputs=tuple(InputSpec(name=f"in.{index}", dtype="float32", dims=("n", 4)) for index in range(3)),
        outputs=tuple(TensorSpec(name=f"out.{index}", dtype="float32", dims=("n", 4)) for index in range(3)),
        batch="n",
    ),
    samples=lambda seed: [{f"in.{index}": torch.rand(2, 4).numpy() for index in range(3)}],
    max_abs=1e-6,
)


def recipe() -> Recipe:
    return RECIPE


def failing() -> Any:
    raise RuntimeError("no weights here")


def wrong() -> Any:
    return 3


def nested() -> Any:
    return VariadicInputs(), (torch.rand(2, 4), [torch.rand(2, 4)])


def too_many() -> Any:
    return DoublingModule(), (torch.rand(2, 4), torch.rand(2, 4))


def returns_nothing() -> Any:
    class Nothing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> int:
            return 3

    return Nothing(), torch.rand(2)


def fails_on_its_sample() -> Any:
    return torch.nn.Linear(3, 4), torch.rand(2, 5)


NUMBER = 3


class WindowedModule(torch.nn.Module):
    """Accepts lengths from 10, the size of its kernel, to 64, the rows of its table."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = torch.nn.Conv1d(1, 4, 10)
        self.positions = torch.nn.Embedding(55, 4)

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        frames = self.kernel(wave[:, None]).transpose(1, 2)
        return frames + self.positions(torch.arange(frames.shape[1]))


def windowed() -> Any:
    torch.manual_seed(0)
    return WindowedModule(), {"wave": torch.rand(2, 40)}


class BroadcastMask(torch.nn.Module):
    """Exported at opset 23 as an Attention node with a mask that ONNX Runtime does not accept."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        heads = x[:, None]
        return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask[:, None, None, :] > 0)


def broadcast_mask() -> Any:
    torch.manual_seed(0)
    return BroadcastMask(), {"x": torch.rand(2, 6, 8), "mask": torch.ones(2, 6, dtype=torch.int64)}


def pooling() -> Any:
    """Return a module that torch exports with the kernel of its sample: other sizes are pooled otherwise."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten()), {"input": torch.rand(2, 3, 8, 8)}


class Recurrent(torch.nn.Module):
    """A GRU over the given number of elements of each row, after a convolution that halves their number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv1d(4, 6, 3, 2, 1)
        self.gru = torch.nn.GRU(6, 5, batch_first=True)

    def forward(self, mel: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the outputs (batch, (time + 1) // 2, 5) for features (batch, time, 4) and lengths (batch,)."""
        hidden = self.conv(mel.transpose(1, 2)).transpose(1, 2)
        halved = torch.div(lengths + 1, 2, rounding_mode="floor")
        packed = torch.nn.utils.rnn.pack_padded_sequence(hidden, halved.cpu(), batch_first=True, enforce_sorted=False)
        padded = torch.nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=hidden.shape[1])
        return {"frames": padded[0]}


def recurrent() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """Return a GRU and two rows, the first of which is complete."""
    torch.manual_seed(0)
    return Recurrent(), (torch.randn(2, 20, 4), torch.tensor([20, 13]))


def short_recurrent() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """Return a GRU and two rows of which none is complete."""
    return recurrent()[0], (torch.randn(2, 20, 4), torch.tensor([18, 13]))
