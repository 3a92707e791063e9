"""StepScales + float ONNX -> quantized ONNX."""
