"""The output folder: written beside the quantized UNet, and run from alone."""
