"""Quantized ONNX -> something that runs: one file per runtime."""
