"""The segmentation itself and the process that serves it; needs torch."""
