"""Labelled 2D images for downstream tasks, and their official layouts."""
