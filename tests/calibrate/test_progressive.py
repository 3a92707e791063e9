import dataclasses

import numpy as np
import pytest
import torch
from class_conditional import TIMESTEPS, class_conditional_denoiser
from diffusers import StableDiffusionXLPipeline
from models.tiny_pipelines import tiny_sdxl

from pcr_export.calibrate.layers import find_layers
from pcr_export.calibrate.progressive import calibrate, num_unet_calls
from pcr_export.calibrate.ranges import ActivationHistogram, minmax_range
from pcr_export.calibrate.simulate import QuantizeSites, Simulation, quantizers_of_step, simulated_call
from pcr_export.calibrate.state import CalibrationState
from pcr_export.calibrate.weights.rounding import NEAREST_8
from pcr_export.errors import PcrExportError
from pcr_export.models.denoiser import sample
from pcr_export.models.pipelines import denoiser_from_pipeline
from pcr_export.recipe import Recipe
from pcr_export.step_scales import write_step_scales

LABELS, SEEDS = [0, 1, 2, 3, 4, 0], [10, 11, 12, 13, 14, 15]
FOUR_A_CALL = {"height": 128, "width": 128}  # of the recipe; the denoiser's pictures are smaller


def recipe(**changes):
    size = {"height": 16, "width": 16}
    return Recipe(**{"model": "toy", "num_inference_steps": 5, "guidance_scale": 1.0, **size, **changes})


def run(denoiser=None, labels=LABELS, seeds=SEEDS, state=None, **changes):
    denoiser = denoiser or class_conditional_denoiser()
    layers = find_layers(denoiser, next(denoiser.walk(LABELS[:1], SEEDS[:1])), ("conv_in", "conv_out"))
    return calibrate(denoiser, layers, labels, seeds, recipe(**changes), state=state)


def count_calls(denoiser):
    """A forward hook that counts (batch size, calls)."""
    sizes = []
    denoiser.network.register_forward_hook(lambda _module, args, _output: sizes.append(len(args[0])))
    return sizes


@pytest.mark.parametrize(("size", "batches"), [({}, [6]), (FOUR_A_CALL, [4, 2])])
def test_each_batch_takes_2t_minus_1_calls(size, batches):
    denoiser = class_conditional_denoiser()
    layers = find_layers(denoiser, next(denoiser.walk(LABELS, SEEDS)), ())
    sizes = count_calls(denoiser)
    calibrate(denoiser, layers, LABELS, SEEDS, recipe(**size))
    assert sizes == batches * (2 * len(TIMESTEPS) - 1)


@pytest.mark.parametrize("size", [{}, FOUR_A_CALL])
def test_step_t_is_observed_behind_quantized_steps(size):
    """The row of every step holds the min-max of a trajectory whose earlier steps ran with the rows before it."""
    denoiser = class_conditional_denoiser()
    layers = find_layers(denoiser, next(denoiser.walk(LABELS, SEEDS)), ("conv_in", "conv_out"))
    scales = calibrate(denoiser, layers, LABELS, SEEDS, recipe(ranges="minmax", affine=False, **size))
    walk = denoiser.walk(LABELS, SEEDS)
    inputs = next(walk)
    with Simulation(denoiser, layers, NEAREST_8) as simulation:
        for step in range(scales.num_steps):
            quantizers = quantizers_of_step(scales, step)
            histograms = {site: ActivationHistogram() for site in scales.sites}
            quantize = QuantizeSites(quantizers, 8)

            def visit(site, x, histograms=histograms):
                histograms[site].update(x)
                return x, 1.0  # the layers upstream have integer weights and float activations

            simulation.run(inputs, visit)
            for site, histogram in histograms.items():
                low, high = minmax_range(histogram)
                assert quantizers[site].scale == pytest.approx(
                    max(-low / 128, high / 127), rel=1e-4
                )  # other batch sizes round otherwise
            if step < scales.num_steps - 1:
                inputs = walk.send(simulation.run(inputs, quantize))


@pytest.mark.parametrize("scheme", ["progressive", "float-trajectory", "static"])
def test_one_two_and_three_batches_give_the_same_bytes(scheme):
    whole, *others = [run(scheme=scheme, calib_batch=size) for size in (6, 3, 2)]
    for other in others:
        assert other.scale.tobytes() == whole.scale.tobytes()
        assert other.zero_point.tobytes() == whole.zero_point.tobytes()


def test_order_changes_nothing_but_rounding():
    reference = run(**FOUR_A_CALL)
    other = run(labels=LABELS[::-1], seeds=SEEDS[::-1], **FOUR_A_CALL)
    np.testing.assert_allclose(
        other.scale, reference.scale, rtol=0.05
    )  # a rounding flip moves the search by a candidate or two
    assert np.median(np.abs(other.scale / reference.scale - 1)) < 1e-4


def test_same_input_same_table():
    first, second = run(), run()
    assert first.scale.tobytes() == second.scale.tobytes()
    assert first.zero_point.tobytes() == second.zero_point.tobytes()


@pytest.mark.parametrize("size", [{}, FOUR_A_CALL])
@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_a_stopped_calibration_goes_on_with_the_same_bytes(tmp_path, stop_after, size):
    whole = run(**size)
    run(state=CalibrationState(tmp_path, "key"), **size)
    for record in sorted(tmp_path.iterdir())[stop_after:]:
        record.unlink()
    denoiser = class_conditional_denoiser()
    sizes = count_calls(denoiser)
    resumed = run(denoiser, state=CalibrationState(tmp_path, "key"), **size)
    assert resumed.scale.tobytes() == whole.scale.tobytes()
    per_step = 4 if size else 2
    assert len(sizes) <= 1 + per_step * (5 - stop_after)  # one call finds the layers


def test_state_of_another_key_is_not_used(tmp_path):
    run(state=CalibrationState(tmp_path, "one"))
    denoiser = class_conditional_denoiser()
    sizes = count_calls(denoiser)
    run(denoiser, state=CalibrationState(tmp_path, "two"))
    assert len(sizes) == 1 + 2 * len(TIMESTEPS) - 1


def test_damaged_state_is_named(tmp_path):
    run(state=CalibrationState(tmp_path, "key"))
    path = tmp_path / "call_00002.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(PcrExportError, match=r"call_00002.*--no-resume"):
        run(state=CalibrationState(tmp_path, "key"))


def test_relaxed_steps_have_their_bits():
    assert run(relax="last:40%").bits.tolist() == [8, 8, 8, 10, 10]


def test_static_scales_are_equal_in_every_step():
    scales = run(scheme="static").scale
    assert (scales == scales[0]).all()


def test_float_trajectory_differs_from_progressive():
    assert not np.array_equal(run(scheme="float-trajectory").scale, run().scale)


def test_first_step_sees_the_same_noise_in_both_schemes():
    """In the first step the schemes differ only by the weights: ranges are close, later ones need not be."""
    progressive, floating = run(ranges="minmax"), run(scheme="float-trajectory", ranges="minmax")
    np.testing.assert_allclose(progressive.scale[0], floating.scale[0], rtol=0.1)


def test_calibrated_simulation_stays_near_the_float_model():
    denoiser = class_conditional_denoiser()
    scales = run(denoiser)
    layers = find_layers(denoiser, next(denoiser.walk(LABELS, SEEDS)), ("conv_in", "conv_out"))
    reference = sample(denoiser, denoiser, LABELS, SEEDS)
    with Simulation(denoiser, layers, NEAREST_8) as simulation:
        simulated = sample(denoiser, simulated_call(simulation, scales, "t"), LABELS, SEEDS)
    error = (simulated - reference).square().mean() / reference.square().mean()
    assert 0 < error < 1e-3  # 30 dB


def test_overflowing_activations_name_the_site():
    denoiser = class_conditional_denoiser()
    denoiser.network.conv_in.weight.data[:] = 1e38
    with pytest.raises(PcrExportError, match=r"site .*NaN or infinite"):
        run(denoiser)


def denoiser_at(timesteps):
    """A denoiser that is called at these timesteps, in their order."""
    denoiser = class_conditional_denoiser()

    def walk(labels, seeds):
        inputs = next(denoiser.walk(labels, seeds))
        for timestep in timesteps:
            inputs = {**inputs, "t": torch.tensor(timestep)}
            inputs["x"] = inputs["x"] - 0.1 * (yield inputs)
        return inputs["x"]

    return dataclasses.replace(denoiser, walk=walk, timesteps=timesteps)


def test_a_repeated_timestep_is_observed_once():
    """PNDM calls one timestep twice: T + 1 calls, T rows."""
    timesteps = (3.0, 2.0, 2.0, 1.0)
    assert num_unet_calls(timesteps, 1) == 2 + 2 + 1 + 1
    assert num_unet_calls(timesteps, 5) == 5 * (2 + 2 + 1 + 1)
    repeating = denoiser_at(timesteps)
    sizes = count_calls(repeating)
    scales = run(repeating, **FOUR_A_CALL)
    assert scales.timesteps.tolist() == [3.0, 2.0, 1.0]
    assert len(sizes) == 1 + num_unet_calls(timesteps, 2)


@pytest.mark.parametrize("scheme", ["progressive", "float-trajectory", "static"])
def test_rows_descend_though_the_walk_does_not(scheme):
    """DPM2 ancestral: a level of the walk may lie above the one before. A row is of its timestep; relaxed are the noisiest."""
    timesteps = (3.0, 1.75, 2.0, 2.0, 1.0)
    scales = run(denoiser_at(timesteps), scheme=scheme, relax="0:2")
    assert scales.timesteps.tolist() == [3.0, 2.0, 1.75, 1.0]
    assert (scales.bits > 8).tolist() == [True, True, False, False]


def test_rising_timesteps_are_refused():
    denoiser = dataclasses.replace(class_conditional_denoiser(), timesteps=(100.0, 300.0))
    with pytest.raises(PcrExportError, match="do not descend"):
        run(denoiser)


def test_more_activation_bits_are_every_step_relaxed():
    wide, relaxed = run(activation_bits=10), run(relax="first:100%", relax_bits=10)
    assert (wide.bits == 10).all()
    np.testing.assert_array_equal(wide.scale, relaxed.scale)


def test_a_pipelines_scales_depend_on_no_batch_size(tmp_path):
    """A float product of few rows rounds otherwise than one of many, in the text encoders as well."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl(tmp_path / "model"))
    denoiser = denoiser_from_pipeline(pipeline, num_inference_steps=3, guidance_scale=4.5, height=16, width=16)
    prompts, seeds = [f"{number} cats" for number in range(6)], list(range(6))
    layers = find_layers(denoiser, next(denoiser.walk(prompts[:2], seeds[:2])), ("conv_in", "conv_out"))
    tables = set()
    for size in (6, 3, 2):
        scales = calibrate(denoiser, layers, prompts, seeds, recipe(num_inference_steps=3, calib_batch=size))
        write_step_scales(scales, tmp_path / "step_scales.safetensors")
        tables.add((tmp_path / "step_scales.safetensors").read_bytes())
    assert len(tables) == 1
