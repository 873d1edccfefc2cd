"""Volumes, bundles, result files and the geometry and costs of a run; numpy and SimpleITK, no torch."""
