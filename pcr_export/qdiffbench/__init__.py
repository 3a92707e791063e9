"""Images to numbers: the quality of the exported artifact against the float model (QDiffBench, arXiv 2311.06322, section 4)."""
