"""The automatic skip list: errors against a computation by hand, resumed by block, and what an export makes of it."""

from pathlib import Path

import pytest
import torch
from class_conditional import class_conditional_denoiser

from pcr_export.calibrate.layers import find_layers
from pcr_export.calibrate.ranges import quantize_dequantize, quantizer_from_range
from pcr_export.calibrate.sensitive_layers import SensitivitySearch, layer_errors
from pcr_export.calibrate.weights.block import Block
from pcr_export.calibrate.weights.block_inputs import BlockCall
from pcr_export.calibrate.weights.nearest import quantize_weight
from pcr_export.calibrate.weights.rounding import NEAREST_8, NearestRounding
from pcr_export.sites import Layer

LABELS, SEEDS = [0, 1, 2], [10, 11, 12]


def search(folder: Path, **changes) -> SensitivitySearch:
    denoiser = class_conditional_denoiser()
    layers = find_layers(denoiser, next(denoiser.walk(LABELS, SEEDS)), ())
    settings = {"round_weight": NEAREST_8, "conditions": LABELS, "seeds": SEEDS, "samples": 10, "seed": 0, **changes}
    return SensitivitySearch(denoiser=denoiser, layers=layers, folder=folder, key={"a": "b"}, **settings)


def test_the_error_of_one_linear_by_hand() -> None:
    """Two steps of three samples, each step with a grid of its own."""
    torch.manual_seed(0)
    module = torch.nn.Linear(7, 5)
    x = torch.randn(6, 7) * torch.tensor([1.0, 1, 1, 20, 20, 20])[:, None]
    layer = Layer(name="layer", op="Linear", site="layer", affine=True, reason=None)
    found = layer_errors(Block("layer", module, [layer], BlockCall(args=[x], kwargs={})), NearestRounding(4), 2)
    q, scale = quantize_weight(module.weight.detach().numpy(), 4)
    weight, error, energy = torch.from_numpy(q * scale[:, None]), 0.0, 0.0
    for part in x.split(3):
        grid = quantizer_from_range(part.min().item(), part.max().item(), affine=True)
        exact = part @ module.weight.T + module.bias
        rounded = quantize_dequantize(part, grid.scale, grid.zero_point) @ weight.T + module.bias
        error += (rounded - exact).square().sum().item()
        energy += exact.square().sum().item()
    # float32 sums of 7 products in another order, twice, against differences of which 4 % of the output remain
    assert found == {"layer": pytest.approx(error / energy, rel=2 * 2 * 7 * 2**-24 / 0.04)}


def test_a_layer_with_an_outlier_is_found(tmp_path: Path) -> None:
    plain = search(tmp_path / "plain").run()
    assert all(0 < error < 0.1 for error in plain.values())
    victim = min(plain, key=plain.__getitem__)
    damaged = search(
        tmp_path / "damaged",
        round_weight=lambda name, w: (lambda q, s: (q, s * (1.5 if name == victim else 1)))(*NEAREST_8(name, w)),
    )
    errors = damaged.run()
    assert max(errors, key=errors.__getitem__) == victim
    assert {name: error for name, error in errors.items() if name != victim} == {
        name: error for name, error in plain.items() if name != victim
    }


def test_a_search_that_was_stopped_goes_on_with_the_next_block(tmp_path: Path) -> None:
    whole = search(tmp_path / "whole").run()
    assert not list((tmp_path / "whole").glob("layer_errors_inputs-*"))
    measured: list[str] = []

    def stop_at_third(name, weight):
        measured.append(name)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return NEAREST_8(name, weight)

    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "parts", round_weight=stop_at_third).run()
    assert search(tmp_path / "parts").run() == whole
