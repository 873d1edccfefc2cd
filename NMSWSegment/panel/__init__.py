"""The Slicer panel: what it checks, says and puts into the scene."""
