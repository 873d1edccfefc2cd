"""NMSW ("No More Sliding Window") segmentation of CT and MR volumes.

The folders name the price of an import: files (numpy, SimpleITK), engine (torch), panel (Slicer), the others (torch, MONAI).
"""

__version__ = "0.1.0"
