"""What a block is called with comes back as it was: integers, rows that all samples share, one row for a whole batch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pcr_export.calibrate.weights.block import Block
from pcr_export.calibrate.weights.block_inputs import BlockRecorder, read_block_call
from pcr_export.errors import PcrExportError
from pcr_export.models.denoiser import Denoiser
from pcr_export.sites import Layer

CLASSES = 4000  # beyond what float16 counts


class BasicTransformerBlock(nn.Module):
    """Called as diffusers' DiT calls its own: labels and timestep are integers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, table: Tensor, *, class_labels: Tensor, shift: Tensor, timestep: Tensor) -> Tensor:
        return x + table + self.linear(input=x) + self.embed(class_labels)[:, None] + shift * timestep[:, None, None]


class Network(nn.Module):
    def __init__(self, table_of: str = "constant") -> None:
        super().__init__()
        self.block = BasicTransformerBlock()
        self.table_of = table_of
        self.register_buffer("table", torch.arange(24.0).reshape(3, 8))

    def forward(self, t: Tensor, x: Tensor, label: Tensor) -> Tensor:
        table = self.table if self.table_of == "constant" else self.table * t
        shift = (t / 1000).reshape(1, 1, 1)
        steps = t.long().expand(len(x))
        return self.block(x, table, class_labels=label, shift=shift, timestep=steps)


def denoiser(table_of: str = "constant") -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(
        network=Network(table_of).eval(),
        call=lambda network, inputs: network(**inputs),
        walk=lambda *_: iter(()),  # these tests make the inputs
        timesteps=(900.0, 500.0),
        dynamic_axes={"t": {}, "x": {0: "batch"}, "label": {0: "batch"}},
        timestep="t",
    )


def record(folder: Path, table_of: str = "constant", samples: int = 6) -> list[dict[str, Tensor]]:
    one = denoiser(table_of)
    recorder = BlockRecorder(one, ["block"], folder, samples, seed=0)
    generator = torch.Generator().manual_seed(1)
    batches = []
    for index, t in enumerate(one.timesteps):
        label = torch.arange(CLASSES - 3, CLASSES)
        batches.append({"t": torch.tensor(t), "x": torch.randn(3, 3, 8, generator=generator), "label": label})
        recorder(index, [batches[-1]])
    return batches


@pytest.mark.parametrize("samples", [6, 2])
def test_a_block_with_integer_arguments_gives_its_output_again(tmp_path: Path, samples: int) -> None:
    batches = record(tmp_path, samples=samples)
    one = denoiser()
    call = read_block_call(tmp_path, "block")
    assert call.num_samples == samples
    assert call.kwargs["class_labels"].dtype == call.kwargs["timestep"].dtype == torch.int64
    assert int(call.kwargs["class_labels"].max()) < CLASSES
    block = Block("block", one.network.block, [Layer(name="block.linear", op="Linear", site="block.linear")], call)
    whole = torch.cat([one(batch) for batch in batches])
    if samples == 6:
        torch.testing.assert_close(block.outputs({}), whole, rtol=1e-2, atol=2e-2)  # x is kept in float16
    assert block.hessians["block.linear"].shape == (8, 8)
    assert len(block.gptq({"block.linear": 4})["block.linear"][1]) == 8


def test_an_argument_without_rows_that_changes_by_the_step_is_named(tmp_path: Path) -> None:
    record(tmp_path, table_of="step")
    with pytest.raises(PcrExportError, match="block block is called with 1, which has no row for each sample"):
        read_block_call(tmp_path, "block")
