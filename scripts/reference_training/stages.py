"""The stages in order, and what each needs from those before it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline

from reference_training.brief import train_brief
from reference_training.clip_vision import train_vision
from reference_training.configurations import build_clip_vision, build_unet, build_vae
from reference_training.evaluation import GOALS, draw_samples, evaluate, held_out_prompts, short_prompts
from reference_training.latents import latent_batches, read_shards, write_shard
from reference_training.loop import read_average, read_weights
from reference_training.package import assemble, write_package
from reference_training.pictures import Pictures, cached_pictures
from reference_training.probe import image_probe, latent_probe, picture_batches, train_probe
from reference_training.prompt_files import write_prompt_files
from reference_training.text import TextTowers, build_towers, train_text
from reference_training.text_gate import check_spread
from reference_training.unet import train_unet
from reference_training.vae import train_vae
from reference_training.yardsticks import score_clip, score_renders

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ROOT / "pcr_export" / "models" / "reference" / "tiny-sdxl"
SAMPLES = ROOT / "docs" / "tiny-sdxl-samples.png"
PICTURES = 30_000
SHARDS = 8  # of 5 000 scenes
STEPS = {"probe": 1200, "text": 650, "vae": 4400, "vision": 3000, "teacher": 800, "unet": 3400, "brief": 400}


@dataclass(frozen=True)
class Training:
    """Where the stages work, on what, a budget of steps that replaces the default one, and how many prompts are judged."""

    folder: Path
    device: torch.device
    steps: int | None = None
    prompts: int = 256

    def budget(self, stage: str) -> int:
        """Return the steps of a stage."""
        return self.steps or STEPS[stage]

    def pictures(self) -> Pictures:
        """Render the training pictures, or map those rendered before."""
        return cached_pictures(self.folder, PICTURES)

    def text(self) -> TextTowers:
        """Load the trained text towers."""
        return read_weights("text", build_towers(self.folder), self.folder).to(self.device)

    def brief_text(self) -> TextTowers:
        """Load the text towers that know short captions, too."""
        return read_weights("brief", build_towers(self.folder), self.folder).to(self.device)

    def vae(self) -> AutoencoderKL:
        """Load the trained autoencoder."""
        return read_weights("vae", build_vae(), self.folder).to(self.device)

    def pipeline(self) -> StableDiffusionXLPipeline:
        """Assemble the pipeline from what is trained so far."""
        unet = read_average("unet", build_unet(), self.folder)
        return assemble(self.folder, self.vae(), self.brief_text(), unet.to(self.device))


def run_probe(training: Training) -> None:
    """Train the judge of pictures."""
    batches = picture_batches(training.pictures(), training.device)
    train_probe("probe", image_probe().to(training.device), batches, training.folder, training.budget("probe"), 0.15)


def run_text(training: Training) -> None:
    """Train both text towers."""
    train_text(training.folder, training.device, training.budget("text"))
    print(json.dumps(check_spread(training.text().cpu(), training.folder / "pipeline")))


def run_vae(training: Training) -> None:
    """Train the autoencoder."""
    train_vae(training.pictures(), training.folder, training.device, training.budget("vae"))


def run_vision(training: Training) -> None:
    """Train the image tower."""
    train_vision(training.pictures(), training.text(), training.folder, training.device, training.budget("vision"))


def run_latents(training: Training) -> None:
    """Encode and caption the scenes that the denoiser learns from."""
    vae, text = training.vae(), training.text()
    for index in range(SHARDS):
        write_shard(index, vae, text, training.folder, training.device)


def run_teacher(training: Training) -> None:
    """Train the reader of latents."""
    batches = latent_batches(read_shards(training.folder), training.device)
    train_probe(
        "teacher", latent_probe().to(training.device), batches, training.folder, training.budget("teacher"), 0.5
    )


def run_unet(training: Training) -> None:
    """Train the denoiser."""
    teacher = read_weights("teacher", latent_probe(), training.folder).to(training.device)
    examples = read_shards(training.folder)
    train_unet(examples, training.folder, training.device, training.budget("unet"), teacher)


def run_brief(training: Training) -> None:
    """Teach the text towers short captions."""
    train_brief(training.text(), training.folder, training.device, training.budget("brief"))


def run_evaluate(training: Training) -> None:
    """Print and write the scores on held-out prompts, and what to read them against."""
    probe = read_weights("probe", image_probe(), training.folder)
    vision = read_weights("vision", build_clip_vision(), training.folder)
    held_out = held_out_prompts(training.prompts, seed=11)
    pipeline = training.pipeline()
    scores, pictures = evaluate(pipeline, probe, held_out)
    found = {
        "samples": scores,
        "short captions": evaluate(pipeline, probe, short_prompts(training.prompts, seed=14))[0],
        **score_renders(probe, training.vae().cpu(), training.prompts),
        "clip": score_clip(vision, training.brief_text().cpu(), training.folder / "pipeline", training.prompts),
    }
    lines = json.dumps(found, indent=1)
    print(lines)
    (training.folder / "scores.json").write_text(lines + "\n")
    draw_samples(pictures[:32], held_out.captions[:32], training.folder / "samples.png")
    missed = [name for name, goal in GOALS.items() if scores[name] < goal]
    print(f"below the acceptance: {', '.join(missed)}" if missed else "accepted")


def run_package(training: Training) -> None:
    """Write the model's folder in FP16."""
    vision = read_weights("vision", build_clip_vision(), training.folder)
    print(f"{MODEL}: {write_package(training.folder, MODEL, training.pipeline(), vision)} bytes")


def run_samples(training: Training) -> None:
    """Draw the README's picture with the packaged model."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(MODEL, add_watermarker=False)
    pipeline.to(training.device, torch.float32)
    probe = read_weights("probe", image_probe(), training.folder)
    held_out = held_out_prompts(32, seed=12)
    scores, pictures = evaluate(pipeline, probe, held_out)
    print(json.dumps(scores))
    draw_samples(pictures, held_out.captions, SAMPLES)


def run_prompts(training: Training) -> None:
    """Write the prompt files below calib/."""
    write_prompt_files(ROOT / "calib")


STAGES: dict[str, Callable[[Training], None]] = {
    "probe": run_probe,
    "text": run_text,
    "vae": run_vae,
    "vision": run_vision,
    "latents": run_latents,
    "teacher": run_teacher,
    "unet": run_unet,
    "brief": run_brief,
    "evaluate": run_evaluate,
    "package": run_package,
    "samples": run_samples,
    "prompts": run_prompts,
}
