"""report.html in a real browser: nothing fails, nothing leaves the page, it fits a phone, and prompts stay text."""

import itertools
import shutil
from dataclasses import asdict

import numpy as np
import pytest

from pcr_export.errors import PcrExportError
from pcr_export.qdiffbench.html_report import write_html_report
from pcr_export.qdiffbench.image_pairs import PairGroup, choose_pairs
from pcr_export.qdiffbench.images import image_path, write_png
from pcr_export.qdiffbench.report_figures import draw_scales
from pcr_export.qdiffbench.scores import PerImage
from pcr_export.qdiffbench.sensitivity import Sensitivity
from pcr_export.qdiffbench.study_figure import plot_fid_against_bits, spread
from pcr_export.qdiffbench.study_report import write_study_report
from pcr_export.recipe import Recipe
from pcr_export.report import make_report
from pcr_export.sites import Layer
from pcr_export.step_scales import StepScales, write_step_scales
from pcr_export.write_files import write_json

STEPS, IMAGES, SIZE = 10, 12, 16
HOSTILE = "</script><img src=x onerror=alert(1)>\"'{{ 7 * 7 }} " + "a_very_long_word" * 20
PROMPTS = [HOSTILE] * IMAGES
PSNR = [100.0 - i for i in range(IMAGES)]
LPIPS = [0.01 * ((7 * i) % IMAGES) for i in range(IMAGES)]  # worst image 5 (0.11), best image 0
ENGINE = {
    "backend": "tensorrt-rtx",
    "version": "1.7.1",
    "target": "sm89",
    "file": "sm89.engine",
    "built": True,
    "int8_layers": 4,
    "float_layers": {},
    "engine_bytes": 3 * 2**20,
    "weight_bytes": 2**20,
    "activation_bytes": 2**19,
}
NARROW, WIDE = {"width": 375, "height": 800}, {"width": 1280, "height": 900}
SCORES = {
    "n_images": IMAGES,
    "fid_to_fp32": 0.0126,
    "fid_to_real": None,
    "kid_to_fp32": -0.00002,
    "clip_score": 96.46,
    "clip_score_fp32": 96.47,
    "psnr_db": 48.05,
    "ssim": 0.991,
    "lpips": 0.055,
    "protocol": {"extractor": "sha256:" + "f" * 64, "versions": {"torch": "2.13"}},
    "warning": "a Frechet distance of 12 images is biased",
}


def make_scales() -> StepScales:
    sites = (
        "time_embedding.linear_1",
        "down_blocks.0.resnets.0.conv1",
        "mid_block.attentions.0.proj_in",
        "up_blocks.1.conv",
    )
    ramp = np.linspace(0, 1, STEPS, dtype=np.float32)[:, None]
    return StepScales(
        scale=(np.exp2(ramp * np.arange(-1, 3, dtype=np.float32)) * 0.01).astype(np.float32),
        zero_point=np.full((STEPS, 4), 128, np.uint8),
        bits=np.array([8] * 8 + [10] * 2, np.uint8),
        timesteps=np.linspace(951, 1, STEPS, dtype=np.float32),
        sites=sites,
        layers={site: site for site in sites},
    )


def write_export(folder):
    """An exported folder without its networks: what the report reads."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(
        model="tiny-sdxl", num_inference_steps=STEPS, guidance_scale=4.5, height=SIZE, width=SIZE, relax="last:20%"
    )
    scales = make_scales()
    layers = [Layer(name=site, op="Conv2d", site=site) for site in scales.sites]
    layers.append(Layer(name="conv_in", op="Conv2d", site=None, reason="skipped by name (conv_in)"))
    fidelity = {
        "artifact_vs_simulation_sqnr_db": 44.7,
        "per_step": [50.0 - step for step in range(STEPS - 1)] + [None],
        "rounding_floor_sqnr_db": 44.7,
        "rounding_floor_per_step": [49.0 - step for step in range(STEPS)],
        "asked_per_step": [38.0] * STEPS,
        "simulation_vs_fp32_sqnr_db": 36.8,
        "simulation_vs_fp32_per_step": [42.0 - step for step in range(STEPS)],
    }
    report = make_report(
        recipe,
        layers,
        calibration={"prompts": 8, "steps": STEPS, "unet_batches": STEPS, "seconds": 1.0, "peak_memory_bytes": 2**30},
        relaxed={"steps": [8, 9], "mean_activation_bits": 8.4},
        sensitivities={},
        weights={"layers": {}, "seconds": 0.0},
        graph={"onnx_bytes": 2**20, "float_bytes": 2**22},
        parts={},
        engines=[ENGINE],
        validation={"fidelity": fidelity, "quality": SCORES},
    )
    write_json(folder / "report.json", report)
    write_step_scales(scales, folder / "step_scales.safetensors")
    write_images(folder / "images" / "float", folder / "images" / "int8")
    per_image = PerImage(prompts=PROMPTS, psnr_db=PSNR, ssim=[0.99] * IMAGES)  # the model brought no network along
    write_json(folder / "images" / "per_image.json", asdict(per_image))


def write_images(reference, quantized):
    """Random pairs, image i with an error of i."""
    draw = np.random.default_rng(0)
    for folder in (reference, quantized):
        folder.mkdir(parents=True)
    for index in range(IMAGES):
        pixels = draw.integers(0, 200, (SIZE, SIZE, 3), dtype=np.uint8)
        write_png(pixels, image_path(reference, index))
        write_png(pixels + np.uint8(index), image_path(quantized, index))


def write_evaluation(folder, prompts=PROMPTS):
    """What `pcr-export evaluate` leaves, and what a relax search does."""
    place = folder / "evaluation" / "in"
    write_images(place / "fp32", place / "artifact")
    per_image = PerImage(prompts=list(prompts), psnr_db=PSNR, ssim=[0.99] * IMAGES, lpips=LPIPS)
    write_json(place / "per_image.json", asdict(per_image))
    domain = {
        "name": "in",
        "prompts_file": "calib/prompts.txt",
        "prompts_sha256": "0" * 64,
        "n_images": IMAGES,
        "fp32": "evaluation/in/fp32",
        "artifact": "evaluation/in/artifact",
        "per_image": "evaluation/in/per_image.json",
        "scores": SCORES,
    }
    write_json(
        folder / "evaluation.json",
        {"format": 1, "command": "pcr-export evaluate <folder>", "seed": 0, "domains": [domain]},
    )
    sensitivity = Sensitivity(
        timesteps=tuple(make_scales().timesteps.tolist()),
        errors=tuple(1e-4 * (STEPS - step) for step in range(STEPS)),
        base_error=9.5e-4,
        relax_bits=10,
        prompts=8,
    )
    write_json(folder / "sensitivity.json", sensitivity.facts())


def make_study():
    schemes = {
        "static-mse": 0.04,
        "pcr-affine": 0.017,
        "pcr-last-10": 0.012,
        "pcr-last-20": 0.01,
        "pcr-affine-w4a8": 0.6,
    }
    rows = [
        {
            **{name: SCORES[name] for name in ("n_images", "kid_to_fp32", "clip_score", "psnr_db", "ssim", "lpips")},
            "scheme": scheme,
            "bits": "w4a8" if scheme.endswith("w4a8") else "w8a8",
            "relaxed_steps": list(range(20 - relaxed, 20)),
            "mean_activation_bits": 8 + relaxed / 10,
            "domain": domain,
            "seed": 0,
            "fid_to_fp32": fid,
        }
        for domain in ("in", "out")
        for scheme, fid in schemes.items()
        for relaxed in [{"pcr-last-10": 2, "pcr-last-20": 4}.get(scheme, 0)]
    ]
    return {"format": 1, "model": "tiny-sdxl", "command": "c", "hardware": "h", "rows": rows, "protocol": {"n": 2048}}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    write_export(folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    write_export(folder)
    write_evaluation(folder)
    return folder


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no browser to look with: pip install playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium was found: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def look(browser, path, viewport):
    """What a browser says of a page: complaints, requests, layout, headings, images and text."""
    seen = {"complaints": [], "requests": []}
    page = browser.new_page(viewport=viewport)
    page.on("console", lambda message: seen["complaints"].append(message.text))
    page.on("pageerror", lambda error: seen["complaints"].append(str(error)))
    page.on("dialog", lambda dialog: (seen["complaints"].append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: seen["requests"].append(request.url))
    page.goto(path.as_uri())
    seen["overflow"] = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    seen["headings"] = page.locator("h2").all_inner_texts()
    seen["images"] = page.evaluate("[...document.images].map(i => [i.naturalWidth, i.getAttribute('alt')])")
    seen["charts"] = page.evaluate(
        "[...document.querySelectorAll('svg')].map(s => [s.clientWidth, s.getAttribute('aria-label')])"
    )
    seen["unnamed"] = page.locator("th:not([scope])").count()
    seen["text"] = page.inner_text("body")
    page.close()
    return seen


def assert_it_is_sound(seen, path):
    assert seen["complaints"] == []
    assert [url for url in seen["requests"] if not url.startswith("data:")] == [path.as_uri()]
    assert seen["overflow"] == 0
    assert seen["images"]
    assert all(width > 0 and alt for width, alt in seen["images"])
    assert seen["charts"]
    assert all(width > 200 and label for width, label in seen["charts"])
    assert seen["unnamed"] == 0


@pytest.mark.parametrize("viewport", [NARROW, WIDE], ids=["phone", "desktop"])
def test_an_evaluated_folder_in_a_browser(browser, evaluated, viewport):
    path = write_html_report(evaluated)
    seen = look(browser, path, viewport)
    assert_it_is_sound(seen, path)
    assert seen["headings"] == [
        "Figures",
        "Worst, median and best images",
        "Protocol",
        "Scale by step",
        "Error by step",
        "Where the bits went",
        "Engines",
    ]
    assert len(seen["images"]) == 2 * 9
    assert len(seen["charts"]) == 4
    assert HOSTILE in seen["text"]
    for said in ("0.0126", "-0.0200", "96.46", "versions.torch", "skipped by name (conv_in)", "Worst", "LPIPS 0.1100"):
        assert said in seen["text"]


def test_a_folder_without_evaluation_shows_its_validation(browser, exported):
    path = write_html_report(exported)
    seen = look(browser, path, NARROW)
    assert_it_is_sound(seen, path)
    assert "not been evaluated yet: run pcr-export evaluate" in seen["text"]
    assert "sensitivity of each step was not measured" in seen["text"]
    assert "Ordered by PSNR" in seen["text"]
    assert len(seen["charts"]) == 3


def test_engines_are_listed_with_their_size_and_memory(evaluated):
    page = write_html_report(evaluated).read_text("utf-8")
    section = page[page.index(">Engines<") :]
    for words in ("tensorrt-rtx 1.7.1", "sm89", "3.0 MiB", "1.0 MiB weights + 0.5 MiB activations", "4 INT8, 0 float"):
        assert words in section
    assert "sm89 memory" in page  # in the summary


@pytest.mark.parametrize("viewport", [NARROW, WIDE], ids=["phone", "desktop"])
def test_a_study_in_a_browser(browser, evaluated, tmp_path, viewport):
    place = evaluated / "evaluation" / "in"
    pairs = choose_pairs(place / "fp32", place / "artifact", PerImage(prompts=PROMPTS, psnr_db=PSNR, lpips=LPIPS))
    path = write_study_report(
        make_study(), tmp_path / "study.html", pairs=[PairGroup(title="pcr-last-20", pairs=pairs)]
    )
    seen = look(browser, path, viewport)
    assert_it_is_sound(seen, path)
    assert {"Figures", "FID to FP32 against mean bits", "Not measured", "Worst, median and best images"} <= {
        *seen["headings"]
    }
    assert "\N{MINUS SIGN}75 %" in seen["text"]  # 0.01 against 0.04
    assert len(seen["charts"]) == 2


def test_the_browser_test_can_fail(browser, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text(
        f"<body><div style='width:999px'>x</div><img src=nowhere.png><script>alert(1)</script>{HOSTILE}</body>"
    )
    seen = look(browser, path, NARROW)
    assert seen["complaints"]
    assert seen["overflow"] > 0
    assert len(seen["requests"]) > 1
    assert HOSTILE not in seen["text"]
    assert [0, None] in seen["images"]


def test_same_input_same_bytes(evaluated, tmp_path):
    first = write_html_report(evaluated).read_bytes()
    assert write_html_report(evaluated).read_bytes() == first
    drawings = [
        plot_fid_against_bits(make_study(), tmp_path / name).read_bytes()
        for name in ("a.svg", "b.svg", "a.png", "b.png")
    ]
    assert drawings[0] == drawings[1]
    assert drawings[2] == drawings[3]


def test_images_that_were_deleted_are_missed(evaluated, tmp_path):
    folder = shutil.copytree(evaluated, tmp_path / "copy")
    shutil.rmtree(folder / "evaluation" / "in" / "fp32")
    assert "images of in are no longer in the folder" in write_html_report(folder).read_text("utf-8")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("report.json", b"{", "report.json can't be read"),
        ("report.json", b'{"model": "m"}', "report.json has format None"),
        ("report.json", b"[]", "report.json holds no JSON object"),
        ("step_scales.safetensors", b"\0" * 9, "step_scales.safetensors is no readable table"),
        ("evaluation.json", b'{"domains": 3}', "evaluation.json has format None"),
        (
            "evaluation/in/per_image.json",
            b'{"prompts": ["a"], "psnr_db": [1], "lpips": [0.1, 0.2]}',
            "per_image.json was written by another",
        ),
        ("evaluation/in/per_image.json", b'{"loss": []}', "per_image.json was written by another version"),
        ("evaluation/in/fp32/00005.png", b"no image", r"00005.png can't be read .*: delete it"),
        ("sensitivity.json", b'{"steps": []}', r"sensitivity.json is damaged .*write it again"),
    ],
)
def test_damaged_files_are_named(evaluated, tmp_path, name, content, message):
    folder = shutil.copytree(evaluated, tmp_path / "copy")
    (folder / name).write_bytes(content)
    with pytest.raises(PcrExportError, match=message) as caught:
        write_html_report(folder)
    assert "\n" not in str(caught.value)


def test_a_study_without_rows_or_fields_is_refused(tmp_path):
    with pytest.raises(PcrExportError, match="no row with an FID"):
        write_study_report({**make_study(), "rows": []}, tmp_path / "study.html")
    with pytest.raises(
        PcrExportError, match=r"study.json was written by another version or is damaged \(KeyError: 'rows'\)"
    ):
        write_study_report({"model": "m"}, tmp_path / "study.html")


def test_pairs_are_the_worst_the_median_and_the_best(tmp_path):
    reference, quantized = tmp_path / "a", tmp_path / "b"
    write_images(reference, quantized)

    def chosen(psnr_db, lpips=()):
        per_image = PerImage(prompts=PROMPTS, psnr_db=psnr_db, lpips=list(lpips))
        pairs = choose_pairs(reference, quantized, per_image)
        return {kind: [pair.index for pair in pairs if pair.kind == kind] for kind in ("worst", "median", "best")}

    assert chosen(psnr_db=PSNR) == {"worst": [11, 10, 9], "median": [7, 6, 5], "best": [2, 1, 0]}
    assert chosen(psnr_db=PSNR, lpips=LPIPS)["worst"] == [5, 10, 3]
    assert chosen(psnr_db=PSNR[:2]) == {"worst": [1], "median": [], "best": [0]}
    assert chosen(psnr_db=PSNR[:4]) == {"worst": [3, 2], "median": [], "best": [1, 0]}


def test_large_images_are_shown_smaller(tmp_path):
    reference, quantized = tmp_path / "a", tmp_path / "b"
    for folder in (reference, quantized):
        folder.mkdir()
        write_png(np.zeros((600, 800, 3), np.uint8), image_path(folder, 0))
    (pair,) = choose_pairs(reference, quantized, PerImage(prompts=["a cat"], psnr_db=[100.0]))
    assert (pair.size, pair.pixelated) == (384, False)


def test_a_printed_study_fits_the_paper(browser, tmp_path):
    page = browser.new_page(viewport={"width": 680, "height": 960}, color_scheme="dark")  # A4 without its margins
    page.emulate_media(media="print")
    page.goto(write_study_report(make_study(), tmp_path / "study.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == 680
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(27, 31, 38)"
    page.close()


def test_names_of_points_keep_their_distance():
    assert spread([0.1, 0.5], 0.1) == [0.1, 0.5]
    heights = spread([0.0, 0.5, 0.5, 0.52, 1.0], 0.05)
    assert all(b - a >= 0.05 - 1e-9 for a, b in itertools.pairwise(heights))
    assert heights[0] >= 0
    assert heights[-1] <= 1


def test_a_network_of_a_thousand_sites_stays_small():
    sites = tuple(
        f"{side}_blocks.{block}.layer.{i}" for side in ("down", "up") for block in range(4) for i in range(125)
    )
    scales = StepScales(
        scale=np.random.default_rng(0).uniform(0.1, 1, (50, 1000)).astype(np.float32),
        zero_point=np.full((50, 1000), 128, np.uint8),
        bits=np.full(50, 8, np.uint8),
        timesteps=np.linspace(981, 1, 50, dtype=np.float32),
        sites=sites,
        layers={},
    )
    assert len(draw_scales(scales)) < 600_000
