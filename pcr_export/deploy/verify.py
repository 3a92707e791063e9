"""Whether an exported folder still is what the export wrote and does on this machine what it did there: a line per check."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pcr_export.deploy.signatures import check_signatures
from pcr_export.engines.engine_folder import engine_targets, tensorrt_onnx
from pcr_export.engines.engine_record import check_current, read_engine_record
from pcr_export.errors import PcrExportError
from pcr_export.manifest import Manifest, StoredImage, check_exported_folder, check_files, file_below, read_manifest

COPY = "copy the folder again from where it is whole, or export it again"
Check = tuple[str, str]  # what was checked, what was found


def verify_folder(folder: Path, *, paint: bool = True) -> Iterator[Check]:
    """Check a folder; every check that holds is yielded as it is done, the first that does not ends it.

    1. manifest.json is as it was written, and every file of it has its sha256. Files beside those are no matter.
    2. Inputs and outputs of every ONNX file are those that the pipeline feeds and reads: names, data types, ranks, known sizes.
    3. Every engine is the one of its record, and was built from the ONNX file that is there.
    4. The stored image, painted again from its prompt and seed by onnxruntime, is the stored one to the PSNR that the manifest asks
       for. It is painted alone, where the export painted many at once, and maybe on another processor: sums are taken in another
       order, and an activation beside a rounding boundary then takes the next integer.

    Args:
        paint: False leaves out the image, which takes as long as `generate`.

    Raises:
        PcrExportError: (exit code 3) one line: what differs and what to do. Exit code 2: the folder is no export.
    """
    check_exported_folder(folder)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    size = sum(listed.bytes for listed in manifest.files.values())
    yield "files", f"{len(manifest.files)} files, {size / 2**20:.1f} MiB: every sha256 as in manifest.json"
    for said in check_signatures(folder):
        yield "signature", said
    for target in engine_targets(folder):
        if f"unet/{target}.engine" in manifest.files:
            yield "engine", _check_engine(folder, target)
    yield "image", _check_image(folder, manifest, paint)


def _check_engine(folder: Path, target: str) -> str:
    path = folder / "unet" / f"{target}.engine"
    try:
        record = read_engine_record(path)
        check_current(record, path, onnx_path=tensorrt_onnx(folder))
    except PcrExportError as error:
        raise PcrExportError(str(error), exit_code=3) from error
    return f"{path.name}: {record.flavour} {record.version}, of this ONNX file"


def _check_image(folder: Path, manifest: Manifest, paint: bool) -> str:
    stored = manifest.image
    if stored is None:
        return "none is stored: the folder was exported with --no-validate, or is no pipeline"
    if not paint:
        return "not painted: --no-image"
    if not (folder / "vae_decoder").is_dir():
        return "not painted: the folder was exported with --strip-encoders"
    return _compare_image(folder, stored)


def _compare_image(folder: Path, stored: StoredImage) -> str:
    import numpy as np
    import torch  # the checks before do without it, and without diffusers

    from pcr_export.deploy.run import generate
    from pcr_export.qdiffbench.distances import psnr_db
    from pcr_export.qdiffbench.images import read_image

    path = file_below(folder, stored.file)
    stored_image = read_image(path, advice=COPY)
    reference = torch.from_numpy(np.array(stored_image)).permute(2, 0, 1)[None]  # uint8 [1, 3, height, width]
    image = torch.from_numpy(generate(folder, stored.prompt, seed=stored.seed)).permute(2, 0, 1)[None]
    if image.shape != reference.shape:
        raise PcrExportError(f"{folder} paints images of another size than {stored.file}: {COPY}", exit_code=3)
    (psnr,) = psnr_db(image, reference)
    if psnr < stored.min_psnr_db:
        raise PcrExportError(
            f"{folder} paints another image than {stored.file} from the same prompt and seed (PSNR {psnr:.1f} dB, at least "
            f"{stored.min_psnr_db:.1f}): install the versions that `pcr-export inspect` tells, or export again here",
            exit_code=3,
        )
    return (
        f"{stored.file} painted again: PSNR {psnr:.1f} dB (at least {stored.min_psnr_db:.1f}; 100 is the same pixels)"
    )
