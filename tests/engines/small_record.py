"""The record of an engine that nobody built: what the small graph of small_qdq.py takes, no more."""

from pcr_export.engines.engine_record import EngineRecord


def small_record() -> EngineRecord:
    return EngineRecord(
        flavour="tensorrt-rtx",
        version="1.7.1",
        target="sm89",
        compute_capability="8.9",
        axes={"batch": (1, 2, 2), "height": (8, 16, 32), "width": (8, 16, 16)},
        inputs={"sample": ((1, 32, 8, 8), (2, 32, 16, 16), (2, 32, 32, 16)), "timestep": ((), (), ())},
        flags=(),
        onnx_sha256="",
        engine_sha256="",
        engine_bytes=0,
        kernels=0,
        pointwise_kernels=0,
        kernel_table=(),
        data_dependent=False,
        weight_bytes=None,
        activation_bytes=None,
        parse_seconds=0.0,
        build_seconds=0.0,
        peak_bytes=None,
        sites={},
        built=True,
        ran=False,
        trtexec="",
        rebuild_command="again",
    )
