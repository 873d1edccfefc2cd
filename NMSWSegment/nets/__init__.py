"""The nets: backbones built from MONAI parts, and the coarse and local nets of NMSW around them."""
