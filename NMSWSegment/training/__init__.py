"""Training: synthetic and real samples, losses, the loop, and the export to a bundle; may need MONAI."""
