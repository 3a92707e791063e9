"""The durable state of a calibration: one file per denoiser call, from which a stopped run goes on with the same bytes.

A walk is deterministic, so the outputs of the calls so far replay its latents and its scheduler's history without calling the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pcr_export.calibrate.ranges import Quantizer
from pcr_export.errors import PcrExportError
from pcr_export.read_files import check_regular
from pcr_export.write_files import write_bytes


@dataclass(frozen=True)
class CallRecord:
    """What one denoiser call left behind."""

    outputs: list[Tensor]  # per prompt batch, float32 [batch, ...]; empty after the last call
    quantizers: dict[str, Quantizer]  # by site; the row that the call ran with


class CalibrationState:
    """A folder of call records that belong to one `key` (the hash of everything that the records depend on)."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = folder
        self._key = key

    def read(self) -> list[CallRecord]:
        """The records of the calls finished so far, up to the first that is missing or belongs to another key.

        Raises PcrExportError where a record is damaged.
        """
        records: list[CallRecord] = []
        while (path := self._path(len(records))).exists():
            record = self._read_record(path)
            if record is None:
                break  # it and those behind it are written again, one after the other
            records.append(record)
        return records

    def write(self, index: int, record: CallRecord) -> None:
        """Keep the record of call `index`, through a temporary name."""
        quantizers = record.quantizers
        tensors = {f"output.{i}": output.contiguous() for i, output in enumerate(record.outputs)}
        tensors["scale"] = torch.tensor([q.scale for q in quantizers.values()], dtype=torch.float32)
        tensors["zero_point"] = torch.tensor([q.zero_point for q in quantizers.values()], dtype=torch.uint8)
        write_bytes(self._path(index), save(tensors, {"key": self._key, "sites": "\n".join(quantizers)}))

    def clear(self) -> None:
        """Delete every record."""
        for path in self._folder.glob("call_*"):
            path.unlink()

    def _path(self, index: int) -> Path:
        return self._folder / f"call_{index:05d}.safetensors"

    def _read_record(self, path: Path) -> CallRecord | None:
        advice = "delete that file to go on from the step before it, or start anew with --no-resume"
        check_regular(path, advice=advice)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != self._key:
                    return None
                sites = metadata["sites"].split("\n")
                scale, zero_point = file.get_tensor("scale").tolist(), file.get_tensor("zero_point").tolist()
                count = sum(name.startswith("output.") for name in file.keys())  # noqa: SIM118 (safe_open is no mapping)
                outputs = [file.get_tensor(f"output.{i}") for i in range(count)]
                quantizers = {site: Quantizer(s, z) for site, s, z in zip(sites, scale, zero_point, strict=True)}
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise PcrExportError(f"the calibration state {path} is damaged ({error}): {advice}") from error
        return CallRecord(outputs, quantizers)
