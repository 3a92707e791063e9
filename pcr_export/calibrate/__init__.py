"""Torch module in, StepScales out: PCR calibration and the arithmetic that it calibrates for."""
