"""NMSW ("No More Sliding Window") segmentation of CT and MR volumes.

Files directly in this package need at most numpy, SimpleITK and torch; sub-packages may need MONAI.
"""

__version__ = "0.1.0"
