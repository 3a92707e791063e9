"""Small random networks as denoisers: diffusers' UNets of both kinds, and a zoo of single layers."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from pcr_export.models.denoiser import Denoiser, Inputs

BATCH = {0: "batch"}
PICTURE = {0: "batch", 2: "height", 3: "width"}


def unet_denoiser(kind: str) -> Denoiser:
    """A random UNet as in Stable Diffusion ("sd": 1x1 convolutions around attention) or SDXL ("sdxl": text_time, linears)."""
    torch.manual_seed(0)
    extra: dict[str, Any] = {
        "sd": {},
        "sdxl": {
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
        },
    }[kind]
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 4) if kind == "sdxl" else 8,
        cross_attention_dim=24,
        norm_num_groups=4,
        **extra,
    ).eval()
    for module in unet.modules():  # diffusers starts norms at the identity: give gamma and beta something to do
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, 0.0, 0.2)
    axes = {"sample": PICTURE, "timestep": {}, "encoder_hidden_states": BATCH}
    if kind == "sdxl":
        axes |= {"text_embeds": BATCH, "time_ids": BATCH}
    return Denoiser(network=unet, call=_call_unet, walk=_no_walk, timesteps=(), dynamic_axes=axes)


def unet_inputs(denoiser: Denoiser, batch: int = 2, size: int = 8) -> Inputs:
    """Random inputs for `unet_denoiser`."""
    generator = torch.Generator().manual_seed(batch * 100 + size)
    every = {
        "sample": torch.randn(batch, 4, size, size, generator=generator),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": torch.randn(batch, 6, 24, generator=generator),
        "text_embeds": torch.randn(batch, 32, generator=generator),
        "time_ids": torch.full((batch, 6), 8.0),
    }
    return {name: every[name] for name in denoiser.dynamic_axes}


def _call_unet(network: nn.Module, inputs: Inputs) -> Tensor:
    added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
    return network(
        inputs["sample"],
        inputs["timestep"],
        inputs["encoder_hidden_states"],
        added_cond_kwargs=added or None,
        return_dict=False,
    )[0]


def _no_walk(conditions: Any, seeds: Any) -> Any:
    raise AssertionError("these tests call the network themselves")


class LayerZoo(nn.Module):
    """Every kind of layer on the same picture; outputs flattened and joined, so each one's values can be read off."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Conv2d(6, 10, 3, padding=1)
        self.stride = nn.Conv2d(6, 5, 3, stride=2, padding=1)
        self.pixel = nn.Conv2d(6, 7, 1)
        self.skip = nn.Conv2d(6, 7, 1, stride=2, bias=False)
        self.wide = nn.Conv2d(6, 4, 5, padding=2)
        self.dilated = nn.Conv2d(6, 4, 3, dilation=2)
        self.oblong = nn.Conv2d(6, 4, (1, 3), padding=(0, 1))
        self.upsampled = nn.Conv2d(6, 8, 3, padding=1)
        self.tokens = nn.Linear(6, 9)
        self.unbiased = nn.Linear(6, 9, bias=False)
        self.pooled = nn.Linear(6, 3)
        self.gated = nn.Linear(6, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        value, gate = self.gated(tokens).chunk(2, dim=-1)
        pictures = [self.same, self.stride, self.pixel, self.skip, self.wide, self.dilated, self.oblong]
        outputs = [
            *(layer(x) for layer in pictures),
            self.upsampled(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")),
            self.tokens(tokens),
            self.unbiased(tokens),
            self.pooled(x.mean(dim=(2, 3))),
            value,
            gate,
        ]
        return torch.cat([output.flatten(1) for output in outputs], dim=1) + 0 * timestep


def zoo_denoiser() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(
        network=LayerZoo().eval(),
        call=lambda network, inputs: network(inputs["x"], inputs["timestep"]),
        walk=_no_walk,
        timesteps=(),
        dynamic_axes={"x": BATCH, "timestep": {}},
        output="y",
        output_axes=BATCH,
    )
