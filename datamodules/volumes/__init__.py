"""Volumes: cases of several modalities, prepared, cached and cropped."""
