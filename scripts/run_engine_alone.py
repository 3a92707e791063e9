"""Run the UNet's engine on a machine that has only Python, TensorRT (or TensorRT-RTX), numpy and cuda-python; copy this file there.

    python run_engine_alone.py unet/sm89.engine              # random inputs: shapes, and milliseconds per call

In a program of one's own:  unet = Engine("unet/sm89.engine");  noise = unet(sample=..., timestep=..., encoder_hidden_states=...)
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from cuda.bindings import runtime as cuda

try:
    import tensorrt as trt
except ModuleNotFoundError:
    import tensorrt_rtx as trt

CALLS = 10


class Engine:
    """An engine as a function: arrays by input name -> the output, as a new array."""

    def __init__(self, path: str) -> None:
        self.runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self.engine = self.runtime.deserialize_cuda_engine(Path(path).read_bytes())
        if self.engine is None:
            sys.exit(
                f"{path} does not load: it needs the library's version and the GPU that {Path(path).stem}.json names"
            )
        self.context = self.engine.create_execution_context()
        self.stream = checked(cuda.cudaStreamCreate())
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        modes = {name: self.engine.get_tensor_mode(name) for name in names}
        self.inputs = [name for name in names if modes[name] == trt.TensorIOMode.INPUT]
        (self.output,) = (name for name in names if modes[name] == trt.TensorIOMode.OUTPUT)
        self.dtypes = {name: trt.nptype(self.engine.get_tensor_dtype(name)) for name in names}
        self.memory: dict[str, tuple[int, Any]] = {}  # name -> (bytes, address on the GPU)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each input that the engine is best at."""
        return {name: tuple(self.engine.get_tensor_profile_shape(name, 0)[1]) for name in self.inputs}

    def __call__(self, **arrays: np.ndarray) -> np.ndarray:
        """The noise (or v) of one step; `arrays` are the engine's inputs by name, the timestep of rank 0."""
        if unlike := sorted(arrays.keys() ^ set(self.inputs)):
            sys.exit(f"the engine takes {', '.join(self.inputs)}: {', '.join(unlike)} is missing or none of them")
        arrays = {name: np.array(arrays[name], self.dtypes[name], order="C") for name in self.inputs}
        for name, array in arrays.items():
            self.context.set_input_shape(name, array.shape)
            if self.engine.get_tensor_location(name) == trt.TensorLocation.HOST:  # read before anything is launched
                self.context.set_tensor_address(name, array.ctypes.data)
                continue
            address = self.address(name, array.nbytes)
            kind = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
            checked(cuda.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, self.stream))
        output = np.empty(arrays["sample"].shape, self.dtypes[self.output])  # a denoiser's output is its sample's like
        address = self.address(self.output, output.nbytes)
        if not self.context.execute_async_v3(int(self.stream)):
            sys.exit('the engine does not run on these inputs: see their ranges under "inputs" in the JSON beside it')
        kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        checked(cuda.cudaMemcpyAsync(output.ctypes.data, address, output.nbytes, kind, self.stream))
        checked(cuda.cudaStreamSynchronize(self.stream))
        return output

    def address(self, name: str, size: int) -> Any:
        """The address of `size` bytes for a tensor, bound to the context; kept until a call needs more."""
        have, address = self.memory.get(name, (0, None))
        if have < size:
            if address is not None:
                checked(cuda.cudaFree(address))
            address = checked(cuda.cudaMalloc(size))
            self.memory[name] = (size, address)
        self.context.set_tensor_address(name, int(address))
        return address


def checked(result: tuple[Any, ...]) -> Any:
    """The value of a CUDA call, or the end of the program with its error."""
    error, *values = result
    if error != cuda.cudaError_t.cudaSuccess:
        sys.exit(f"CUDA: {error.name}")
    return values[0] if values else None


def main() -> None:
    """Time the engine of the first argument on random inputs."""
    unet = Engine(sys.argv[1])
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal(shape) for name, shape in unet.shapes().items()}
    inputs["timestep"] = np.float32(500)
    output = unet(**inputs)  # the first call compiles kernels
    start = time.perf_counter()
    for _ in range(CALLS):
        output = unet(**inputs)
    seconds = (time.perf_counter() - start) / CALLS
    print(
        {name: np.shape(array) for name, array in inputs.items()}, "->", output.shape, f"{1000 * seconds:.2f} ms a call"
    )


if __name__ == "__main__":
    main()
