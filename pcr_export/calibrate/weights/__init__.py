"""Rounding methods for weights, one a file: arrays in, arrays out."""
