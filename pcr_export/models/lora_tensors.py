"""What the tensors of a LoRA file are, by their names and shapes: each is half of an update, an alpha, or named in a refusal."""

from __future__ import annotations

import re
from collections.abc import Mapping

Shape = tuple[int, ...]
# LAYER and the end of its update: diffusers' and peft's, kohya's, and diffusers' before it used peft
HALF = re.compile(r"(?P<layer>.+?)(?P<kind>[._]lora(?:_linear_layer)?[._])(?P<end>A|B|down|up)\.weight")
FIRST = ("A", "down")  # of the two halves, the one that reads the layer's input
OTHER = {"A": "B", "B": "A", "down": "up", "up": "down"}
KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")  # what its scripts call the parts of a pipeline
OTHER_KINDS = {  # found in a tensor's name -> what such files are called
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"dora_scale$|lora_magnitude_vector": "DoRA",
    r"\.lora_mid\.": "LoCon with a Tucker core (lora_mid)",
    r"\.b?oft_": "OFT",
    r"\.on_input$|\.ia3_l": "IA3",
    r"\.[ab][12]\.weight$": "GLoRA",
    r"\.diff(_b)?$": "whole differences of weights (diff)",
    r"\.[wb]_norm$": "weights of norm layers (w_norm)",
    r"^lora_controlnet$": "Control-LoRA",
    r"^bundle_emb\.|^emb_params$": "textual inversion",
}
ONLY_LORA = "only LoRA, W + B A of every layer, can be fused: merge the file into the model with the program that made it, and export that"


def lora_fault(shapes: Mapping[str, Shape]) -> str | None:
    """Why the tensors of a file, by name and shape, can't be fused as they are; None where each is half of an update or its alpha.

    What diffusers would pass over (with a line in its log) is named here: the picture would not be that of the file.
    """
    for pattern, kind in OTHER_KINDS.items():
        some = [name for name in shapes if re.search(pattern, name)]
        if some:
            return f"it holds {kind} ({_named(some)}): {ONLY_LORA}"
    halves = {name: match for name in shapes if (match := HALF.fullmatch(name))}
    alphas = [name for name in shapes if name.endswith(".alpha")]
    unknown = [name for name in shapes if name not in halves and name not in alphas]
    if unknown:
        return f"it holds what is no part of a LoRA ({_named(unknown)}): {ONLY_LORA}"
    if not halves:
        return "it holds no update of any layer: give a LoRA file"
    return _half_fault(shapes, halves) or _alpha_fault(alphas, halves, shapes) or _prefix_fault(list(shapes))


def other_half(name: str) -> str:
    """LAYER.lora_down.weight -> LAYER.lora_up.weight and back, whatever the spelling."""
    match = HALF.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is no half of an update")
    return f"{match['layer']}{match['kind']}{OTHER[match['end']]}.weight"


def second_half_of(alpha: str, names: Mapping[str, object]) -> str | None:
    """The half of an update that gives the layer's output, for LAYER.alpha; None where the file has no such layer."""
    layer = alpha.removesuffix(".alpha")
    ends = (".lora_up", ".lora_B", ".lora.up", "_lora.up", ".up", ".lora_linear_layer.up")
    return next((name for end in ends if (name := f"{layer}{end}.weight") in names), None)


def _half_fault(shapes: Mapping[str, Shape], halves: Mapping[str, re.Match[str]]) -> str | None:
    for name, match in halves.items():
        other = other_half(name)
        if other not in shapes:
            return f"{name} has no {other} beside it: fetch the file again"
        if match["end"] in FIRST and shapes[name][:1] != shapes[other][1:2]:
            return f"{name} has rank {shapes[name][:1]}, {other} {shapes[other][1:2]}: fetch the file again"
    return None


def _alpha_fault(alphas: list[str], halves: Mapping[str, object], shapes: Mapping[str, Shape]) -> str | None:
    for name in alphas:
        if second_half_of(name, halves) is None:
            return f"{name} belongs to no layer of it: fetch the file again"
        if any(size != 1 for size in shapes[name]):
            return f"{name} is no number, but of shape {list(shapes[name])}: fetch the file again"
    return None


def _prefix_fault(names: list[str]) -> str | None:
    """diffusers takes kohya's names only where every tensor has one."""
    others = [name for name in names if not name.startswith(KOHYA)]
    if others and len(others) < len(names):
        return f"it mixes kohya's names with others ({_named(others)}): save it with names of one kind"
    return None


def _named(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")
