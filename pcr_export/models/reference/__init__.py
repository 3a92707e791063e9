"""The reference model tiny-sdxl: the scenes that it was trained on, their captions, and its weights."""
