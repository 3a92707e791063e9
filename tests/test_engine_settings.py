"""What is asked for of engines, and the sizes that it means for a network's inputs."""

import pytest

from pcr_export.engine_settings import EngineSettings, parse_range
from pcr_export.errors import PcrExportError

SIZES = {"batch": 4, "height": 128, "width": 96}  # two conditions with guidance, 1024 x 768 pixels
PIXELS = {"height": 1024, "width": 768}


def test_one_size_is_that_of_the_calibration():
    axes = EngineSettings(backend="tensorrt-rtx").axes(SIZES, PIXELS, 2)
    assert axes == {"batch": (2, 2, 2), "height": (128, 128, 128), "width": (96, 96, 96)}


def test_ranges_are_images_and_pixels():
    settings = EngineSettings(backend="tensorrt-rtx", batch=(1, 2, 4), height=(512, 1024, 1536))
    axes = settings.axes({**SIZES, "tokens": 77}, PIXELS, 2)
    assert axes == {"batch": (2, 4, 8), "height": (64, 128, 192), "width": (96, 96, 96), "tokens": (77, 77, 77)}


def test_a_size_between_two_latents_is_refused():
    with pytest.raises(PcrExportError, match=r"--height 1001 is no size of the latents: use multiples of 8"):
        EngineSettings(backend="tensorrt-rtx", height=(1001, 1024, 1024)).axes(SIZES, PIXELS, 2)


@pytest.mark.parametrize("height", [(512, 512, 680), (448, 512, 512 + 63), (32, 64, 64)])
def test_the_ends_of_a_range_are_sizes_of_the_unet(height):
    """Which halves latents of 8 pixels three times; this is told before calibration."""
    with pytest.raises(PcrExportError, match=r"--height \d+ is no size of this model's pictures: use multiples of 64"):
        EngineSettings(backend="tensorrt-rtx", height=height).check_picture_sizes(64)
    EngineSettings(backend="tensorrt-rtx", height=(512, 768, 1024), width=None).check_picture_sizes(64)


@pytest.mark.parametrize(("text", "expected"), [("2", (2, 2, 2)), ("1:2:4", (1, 2, 4)), ("1 : 1 : 1", (1, 1, 1))])
def test_ranges_are_read(text, expected):
    assert parse_range("--batch", text) == expected


@pytest.mark.parametrize("text", ["", "two", "1:2", "1:2:3:4", "-1", "1.5"])
def test_other_texts_are_refused(text):
    with pytest.raises(PcrExportError, match=r"--batch .*write one number, or MIN:OPT:MAX"):
        parse_range("--batch", text)


@pytest.mark.parametrize("text", ["0", "2:1:3", "1:3:2", "0:1:2"])
def test_ranges_that_do_not_ascend_are_refused(text):
    with pytest.raises(PcrExportError, match="--batch must be at least 1, and MIN <= OPT <= MAX"):
        parse_range("--batch", text)


def test_unknown_backend_is_refused():
    with pytest.raises(PcrExportError, match="choose one of onnxruntime, tensorrt-rtx, tensorrt"):
        EngineSettings(backend="openvino")


def test_targets_without_a_builder_are_refused():
    with pytest.raises(PcrExportError, match="say --backend tensorrt-rtx"):
        EngineSettings(targets=("sm89",))
