"""Labelled cases on disk, for training and evaluation."""
