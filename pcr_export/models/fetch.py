"""From a hub id to its files: downloaded, or where the hub is out of reach whatever of them its cache holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from transformers.utils import logging as transformers_logging

from pcr_export.errors import PcrExportError
from pcr_export.models.catalog import CatalogEntry
from pcr_export.models.check_folder import check_folder
from pcr_export.models.part_configs import clean_config
from pcr_export.models.read_weights import read_weights

HUB_ERRORS = (OSError, ValueError, RuntimeError)
VARIANTS = (None, "fp16")  # of a UNet of its own repository, in the order in which they are looked for


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of reading what is already here, and the libraries' warnings about it."""
    loggers = (diffusers_logging, transformers_logging)
    before = [(logger.is_progress_bar_enabled(), logger.get_verbosity()) for logger in loggers]
    for logger in loggers:
        logger.disable_progress_bar()
        logger.set_verbosity_error()
    try:
        yield
    finally:
        for logger, (bars, verbosity) in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)
            if bars:
                logger.enable_progress_bar()


def fetch_folder(entry: CatalogEntry) -> Path:
    """The pipeline folder of `entry.source`, a hub id: fetched, or the snapshot in the hub's cache.

    Raises:
        PcrExportError: neither the hub nor the cache has what loading reads.
    """
    if not entry.is_hub_id:
        raise PcrExportError(f"{entry.name}: its folder {entry.source} is missing: install the package again")
    try:
        with quiet():
            folder = DiffusionPipeline.download(
                entry.source,
                use_safetensors=True,
                revision=entry.revision,
                variant=entry.variant,
                safety_checker=None,
                feature_extractor=None,
                image_encoder=None,
            )
    except HUB_ERRORS as error:
        return _cached_folder(entry, error)
    return Path(folder)


def _cached_folder(entry: CatalogEntry, error: Exception) -> Path:
    """What an earlier download left, which may be one variant of the weights alone. Raises PcrExportError where it is not enough."""
    try:
        with quiet():
            folder = snapshot_download(
                entry.source, revision=entry.revision, allow_patterns=["model_index.json"], local_files_only=True
            )
    except HUB_ERRORS:
        raise _unreachable(entry, entry.source, error) from error
    if not (Path(folder) / "model_index.json").is_file():
        raise PcrExportError(
            f"{entry.name}: {entry.source} has no model_index.json in the local cache ({folder}), so it is no pipeline of diffusers: "
            "`pcr-export` on that folder tells what it is"
        ) from error
    try:
        check_folder(Path(folder))
    except PcrExportError as fault:
        raise _unreachable(entry, entry.source, error, f"the local cache is not whole ({fault})") from error
    return Path(folder)


def fetch_unet_config(hub_id: str, entry: CatalogEntry) -> dict[str, Any]:
    """config.json of a repository that holds a UNet alone. Raises PcrExportError as `fetch_unet` does."""
    try:
        with quiet():
            config: dict[str, Any] = dict(UNet2DConditionModel.load_config(hub_id))
    except HUB_ERRORS as error:
        raise _unreachable(entry, hub_id, error) from error
    return clean_config(config, UNet2DConditionModel, f"config.json of {hub_id}")


def fetch_unet(hub_id: str, entry: CatalogEntry) -> Any:
    """The UNet2DConditionModel of a repository that holds it alone.

    Raises:
        PcrExportError: neither the hub nor the cache has it as safetensors, or it lacks tensors.
    """
    errors: list[Exception] = []
    for variant in VARIANTS:
        try:
            with quiet():
                return read_weights(UNet2DConditionModel, hub_id, variant=variant)
        except HUB_ERRORS as error:
            errors.append(error)
    raise _unreachable(entry, hub_id, errors[0]) from errors[0]


def _unreachable(entry: CatalogEntry, hub_id: str, error: Exception, why: str | None = None) -> PcrExportError:
    if isinstance(error, RepositoryNotFoundError) or isinstance(error.__cause__, RepositoryNotFoundError):
        why = why or "the hub has no such repository, or asks for `hf auth login` first"
    elif isinstance(error, OSError) and error.strerror:
        why = why or error.strerror  # of this machine, such as a full disk
    elif "safetensors" in str(error):
        why = why or "it has no weights as safetensors"
    folder = f"./{hub_id.split('/')[1]}"
    way = f"`hf download {hub_id} --local-dir {folder}` where there is a network, then `pcr-export {folder}`"
    if entry.unet is not None:
        way = f"`hf download {entry.source}` and `hf download {entry.unet}` where there is a network, and bring that cache (HF_HOME) here"
    why = why or "it is not in the local cache and the hub is out of reach"
    return PcrExportError(f"{entry.name}: {hub_id} can't be loaded, {why}: run {way}")
