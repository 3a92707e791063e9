"""Draws with an exported folder as optimum does; run by the interpreter of an environment that has optimum-onnx.

FOLDER CLASS PROMPT NEGATIVE_PROMPT STEPS GUIDANCE_SCALE HEIGHT WIDTH OUT SEED...    writes OUT/SEED.png
"""

import sys
from pathlib import Path

import optimum.onnxruntime
import torch

folder, class_name, prompt, negative_prompt, steps, guidance_scale, height, width, out, *seeds = sys.argv[1:]
pipeline = getattr(optimum.onnxruntime, class_name).from_pretrained(folder)
pipeline.set_progress_bar_config(disable=True)
for seed in seeds:
    (image,) = pipeline(
        prompt,
        negative_prompt=negative_prompt,
        num_inference_steps=int(steps),
        guidance_scale=float(guidance_scale),
        height=int(height),
        width=int(width),
        generator=torch.Generator().manual_seed(int(seed)),
    ).images
    image.save(Path(out) / f"{seed}.png")
