"""pcr_export: INT8 deployment artifacts for diffusion models, with one activation scale per denoising step."""
