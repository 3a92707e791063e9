"""The wheel with the lowest versions that pyproject.toml allows, on every Python in PYTHONS that is found here.

`bash scripts/check.sh --lowest [PYTHON ...]`, e.g. 3.11. Outside the tree: the main job on the reference model, cut short, and what
reads its folder, with the plain dependencies alone; then each extra. A line a check; the first that fails ends it, with its command.
Releases come from where uv is told to look (UV_FIND_LINKS, UV_INDEX_URL). PyPI's torch is a CUDA build: 3 GB, which uv's cache keeps.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")  # those for which every floor has a wheel
SHORT = ("--bits", "w8a8", "--steps", "2", "--calib-size", "2", "--images", "2")
PROMPT = "a red circle above a blue square"
NEEDED_SOURCES = ("tensorrt-rtx", "tensorrt-rtx-cu13")  # small packages that name others, published as source alone
# gpu replaces a plain dependency, tensorrt needs a GPU, bench and dev are for this tree
EXTRAS = ("cluster", "fid", "lora", "rtx")

FLOORS = """
import sys
from importlib.metadata import requires, version
from packaging.requirements import Requirement
from packaging.version import Version
for line in requires("pcr-export"):
    wanted = Requirement(line)
    if wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in sys.argv[1:]):
        (floor,) = (Version(each.version) for each in wanted.specifier if each.operator == ">=")
        found = Version(version(wanted.name))
        assert Version(found.public) == floor, f"{wanted.name} {found} is the lowest that fits, not {floor}: raise its floor"
"""
LORA = """
import sys
import numpy as np
from safetensors.numpy import save_file
layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
down, up = np.full((2, 96), 0.01, np.float32), np.full((96, 2), 0.01, np.float32)
save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, sys.argv[1])
"""


def main() -> None:
    """Build the wheel and check it on each Python."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        uv = work / "uv" / "bin" / "uv"
        check(work, "uv's own environment", sys.executable, "-m", "venv", work / "uv")
        check(work, "uv", work / "uv" / "bin" / "python", "-m", "pip", "install", "--quiet", "uv")
        check(work, "the wheel", uv, "build", "--wheel", "--out-dir", work / "dist", ROOT)
        (wheel,) = (work / "dist").glob("*.whl")
        for version in sys.argv[1:] or PYTHONS:
            python = find_python(version)
            if python is None:
                print(f"skipped: Python {version} is not found here", flush=True)
                continue
            with tempfile.TemporaryDirectory(dir=work) as place:
                check_python(Path(place), version, python, uv, wheel)


def find_python(version: str) -> str | None:
    """An interpreter that starts: of PATH, or of pyenv, whose entries on PATH start none but the chosen ones."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = (shutil.which(f"python{version}"), *sorted(map(str, pyenv.glob(f"versions/{version}.*/bin/python"))))
    for path in filter(None, found):
        if subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            return path
    return None


def check_python(work: Path, version: str, python: str, uv: Path, wheel: Path) -> None:
    """Everything on one Python, in environments and folders inside `work`."""
    environment = work / "environment"
    program = environment / "bin" / "pcr-export"
    folder = work / "engines" / "tiny-sdxl-w8a8"

    def step(name: str, *command: str | Path, says: str = "", code: int = 0) -> None:
        check(work, f"Python {version}: {name}", *command, says=says, code=code)

    def install(*extras: str) -> None:
        options = ["--python", environment, "--resolution", "lowest-direct", "--only-binary", ":all:"]
        options += [word for name in NEEDED_SOURCES for word in ("--no-binary", name)]
        options += [word for extra in extras for word in ("--extra", extra)]
        step("dependencies", uv, "pip", "install", *options, "-r", ROOT / "pyproject.toml")
        step("package", uv, "pip", "install", "--python", environment, "--no-deps", wheel)
        step("they fit each other", uv, "pip", "check", "--python", environment)
        step("they are the floors", environment / "bin" / "python", "-c", FLOORS, *extras)

    step("environment", uv, "venv", "--python", python, environment)
    install()
    export = (program, "tiny-sdxl", *SHORT, "--out", work / "engines")
    step("export", *export, says="PSNR to FP32")
    step("generate", program, "generate", folder, PROMPT, "--seed", "1", "-o", work / "picture.png")
    step("inspect", program, "inspect", folder, says="scales by step")
    step("verify", program, "verify", folder)
    evaluate = (program, "evaluate", folder, "--images", "2")
    step("evaluate", *evaluate, says="PSNR")
    lora = work / "style.safetensors"
    step("a LoRA", environment / "bin" / "python", "-c", LORA, lora)
    step("lora: says what to install", *export, "--lora", lora, says="pip install 'pcr-export[lora]'", code=2)
    install(*EXTRAS)
    step("rtx: engine", *export, "--backend", "tensorrt-rtx", "--target", "sm89", says="sm89")
    step("cluster: workers", *evaluate, "--no-resume", "--workers", "2", says="PSNR")
    step("fid: says which file is missing", *evaluate, "--inception", work / "absent.pth", says="absent.pth", code=2)
    step("lora: export", *export, "--no-validate", "--lora", f"{lora}:0.5")


def check(work: Path, name: str, *command: str | Path, says: str = "", code: int = 0) -> None:
    """Run a command in `work` and print a line. It must end with `code`, and what it prints must hold `says`."""
    start = time.monotonic()
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(command, cwd=work, env=environment, stdin=subprocess.DEVNULL, stdout=printed,
                                   stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        try:
            process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and whatever it left behind, before its folder goes
        printed.seek(0)
        text = printed.read()
    if process.returncode != code or says not in text:
        print(*text.splitlines()[-25:], sep="\n")
        wanted = f"exit code {code}" + f" and the words {says!r}" * bool(says)
        sys.exit(f"FAILED: {name}: exit code {process.returncode}, not {wanted}: {shlex.join(map(str, command))}")
    print(f"{time.monotonic() - start:4.0f} s  {name}", flush=True)


if __name__ == "__main__":
    main()
