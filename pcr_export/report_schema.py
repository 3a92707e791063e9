"""What is read of the JSON files that tell of an export: report.json, evaluation.json, per_image.json and sensitivity.json."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired, Required, TypedDict

from msgspec import Meta

Bytes = Annotated[int, Meta(ge=0, le=2**60)]
Pixels = Annotated[int, Meta(ge=1, le=2**16)]
Bits = Annotated[int, Meta(ge=1, le=32)]
Count = Annotated[int, Meta(ge=0, le=2**40)]
BySteps = Annotated[list[float | None], Meta(max_length=10**4)]
Step = Annotated[int, Meta(ge=0, le=10**4)]


class RecipeFacts(TypedDict):
    """The recipe in a report."""

    num_inference_steps: Count
    guidance_scale: float
    guidance_rescale: NotRequired[float]
    scheduler: NotRequired[str | None]
    height: Pixels
    width: Pixels
    weight_bits: Bits
    activation_bits: Bits
    relax_bits: Bits
    scheme: str
    ranges: str
    weights: str
    calib_size: Count
    min_sqnr_db: float | None
    hash: str


class SiteRow(TypedDict):
    """A layer."""

    name: str
    site: str | None
    bits: str
    quantized: bool
    reason: str | None
    weight_error: float | None
    weight_rtn_error: float | None


class Calibration(TypedDict):
    """What the calibration took."""

    prompts: Count
    steps: Count
    unet_batches: Count
    seconds: float
    peak_memory_bytes: Bytes
    ranges: NotRequired[str]
    range_sqnr_db: NotRequired[dict[str, float | None]]


class Relaxed(TypedDict, total=False):
    """The relaxed steps."""

    steps: Annotated[list[Step], Meta(max_length=10**4)]
    mean_activation_bits: float
    choice: str
    errors: dict[str, float]


class LearnedWeights(TypedDict):
    """What learning the rounding took."""

    seconds: float


class Graph(TypedDict):
    """The UNet's file."""

    onnx_bytes: Bytes
    float_bytes: Bytes


class Part(TypedDict):
    """A text encoder, or a half of the VAE, whose weights were to be stored smaller."""

    form: str
    sqnr_db: dict[str, float | None]
    bytes: Bytes
    float_bytes: Bytes


class Percentiles(TypedDict, total=False):
    """Milliseconds."""

    p50: float
    p95: float


class Engine(TypedDict, total=False):
    """onnxruntime, or an engine of TensorRT; each has some of these."""

    backend: str
    target: str
    built: bool
    file: str
    version: str
    trtexec: str
    warning: str
    engine_bytes: Bytes
    weight_bytes: Bytes | None
    activation_bytes: Bytes | None
    peak_memory_bytes: Bytes
    float_peak_memory_bytes: Bytes
    int8_layers: Count
    float_layers: dict[str, str]
    speedup: float
    mean_ms: float
    batch: Count
    threads: Count
    latency_ms: Percentiles
    float_latency_ms: Percentiles
    relaxed_latency_ms: Percentiles
    int8_ms: Percentiles
    relaxed_ms: Percentiles
    fp16_ms: Percentiles


class Fidelity(TypedDict):
    """The artifact against its simulation, and that against the float network, in dB."""

    artifact_vs_simulation_sqnr_db: float | None
    rounding_floor_sqnr_db: float | None
    simulation_vs_fp32_sqnr_db: float | None
    per_step: BySteps
    simulation_vs_fp32_per_step: BySteps
    asked_per_step: NotRequired[Annotated[list[float], Meta(max_length=10**4)]]


class Scores(TypedDict, total=False):
    """QDiffBench's figures."""

    n_images: Count
    fid_to_fp32: float | None
    fid_to_real: float | None
    kid_to_fp32: float | None
    clip_score: float | None
    clip_score_fp32: float | None
    psnr_db: float | None
    ssim: float | None
    lpips: float | None
    protocol: dict[str, Any]
    warning: str | None


class Report(TypedDict):
    """report.json."""

    model: str
    recipe: RecipeFacts
    environment: dict[str, str]
    calibration: Calibration
    relaxed: Relaxed
    weights: LearnedWeights
    sites: list[SiteRow]
    graph: Graph
    parts: NotRequired[dict[str, Part]]
    engines: list[Engine]
    fidelity: Fidelity | None
    quality: Scores | None
    warnings: NotRequired[list[str]]


class Domain(TypedDict):
    """A prompt set that was evaluated."""

    name: str
    prompts_file: str
    prompts_sha256: str
    fp32: Any  # a name below the folder, which `path_inside` looks at
    artifact: Any
    per_image: Any
    scores: Scores


class Evaluation(TypedDict):
    """evaluation.json."""

    command: str
    seed: int
    domains: list[Domain]


class Gain(TypedDict):
    """What relaxing one step alone takes off the error."""

    gain: float


class Sensitivity(TypedDict):
    """sensitivity.json."""

    steps: Annotated[list[Gain], Meta(min_length=1, max_length=10**4)]
    relax_bits: Bits
    base_error: float
    prompts: Count


class StudyRow(Scores, total=False):
    """A scheme, or what stands beside the schemes, in one domain."""

    key: Required[str]
    scheme: str
    domain: str
    eval_domain: str
    bits: str
    mean_activation_bits: float
    relaxed_steps: Annotated[list[Step], Meta(max_length=10**4)]
    simulated: bool
    seed: int


class Study(TypedDict, total=False):
    """study.json; each list of rows is there where it was asked for."""

    model: str
    command: str | None
    hardware: str | None
    rows: list[StudyRow]
    simulation: list[StudyRow]
    calibration_sets: list[StudyRow]
    scale_bars: list[StudyRow]
    reference: dict[str, Scores]
    protocol: dict[str, Any]


class PerImage(TypedDict, total=False):
    """per_image.json: a value for each image."""

    prompts: list[str]
    psnr_db: list[float]
    ssim: list[float]
    lpips: list[float]
