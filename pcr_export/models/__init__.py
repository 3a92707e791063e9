"""What is exported: the catalog, the loading of pipelines, and the Denoiser through which every model enters."""
