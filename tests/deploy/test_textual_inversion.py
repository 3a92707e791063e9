"""A textual inversion that was loaded before the export is in the exported text encoder and tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from models.tiny_pipelines import CROSS_ATTENTION, TOKENS, tiny_sd
from safetensors.torch import save_file

from pcr_export.deploy.folder import write_configs
from pcr_export.deploy.onnx_parts import export_text_encoder
from pcr_export.deploy.parts import OnnxTextEncoder
from pcr_export.deploy.pipeline import read_tokenizers
from pcr_export.errors import PcrExportError
from pcr_export.models.catalog import resolve
from pcr_export.models.load import load_model

ROUNDING = 1e-4  # float32, another order of summation than torch's; values of order 1


def test_a_folder_saved_with_one_exports(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    save_file({"<cat>": torch.randn(2, CROSS_ATTENTION, generator=generator)}, tmp_path / "cat.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd(tmp_path / "plain"))
    pipeline.load_textual_inversion(tmp_path / "cat.safetensors")
    pipeline.save_pretrained(tmp_path / "with")
    float_pipeline = load_model(resolve(str(tmp_path / "with"))).pipeline
    write_configs(float_pipeline, tmp_path / "out")
    export_text_encoder(float_pipeline.text_encoder, TOKENS, tmp_path / "out" / "text_encoder" / "model.onnx")
    (tokenizer,) = read_tokenizers(tmp_path / "out")
    encoder = OnnxTextEncoder(tmp_path / "out" / "text_encoder", threads=1)
    texts = []
    for each, network in ((float_pipeline.tokenizer, float_pipeline.text_encoder), (tokenizer, encoder)):
        prompt = pipeline.maybe_convert_prompt("a <cat> in red", each)
        assert prompt == "a <cat> <cat>_1 in red"
        texts.append(network(each(prompt, padding="max_length", return_tensors="pt").input_ids)[0])
    torch.testing.assert_close(texts[1], texts[0], atol=ROUNDING, rtol=0)
    tokenizer.add_tokens("<dog>")
    with pytest.raises(
        PcrExportError, match="knows 84 tokens, and the prompt has token 84: load the textual inversion"
    ):
        encoder(tokenizer("a <dog>", padding="max_length", return_tensors="pt").input_ids)
