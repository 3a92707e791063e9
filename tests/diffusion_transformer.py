"""diffusers' DiT as a denoiser: class labels and an integer timestep go into every block."""

from collections.abc import Sequence

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from pcr_export.models.denoiser import Denoiser, Inputs, Walk

TIMESTEPS = (800.0, 500.0, 200.0)


def call(network: nn.Module, inputs: Inputs) -> Tensor:
    """DiT takes int64 timesteps [batch]: they are made of the rank-0 float32 here, inside the graph."""
    x = inputs["x"]
    steps = inputs["t"].to(torch.int64).expand(x.shape[0])
    output: Tensor = network(x, timestep=steps, class_labels=inputs["label"], return_dict=False)[0]
    return output


def walk(labels: Sequence[int], seeds: Sequence[int]) -> Walk:
    x = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    for timestep in TIMESTEPS:
        noise = yield {"t": torch.tensor(timestep), "x": x, "label": torch.tensor(labels)}
        x = x - 0.3 * noise
    return x


def dit_denoiser(seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    network = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    ).eval()
    return Denoiser(
        network=network,
        call=call,
        walk=walk,
        timesteps=TIMESTEPS,
        timestep="t",
        dynamic_axes={"t": {}, "x": {0: "batch"}, "label": {0: "batch"}},
        output_axes={0: "batch"},
    )
