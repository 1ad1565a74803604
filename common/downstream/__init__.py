"""Downstream tasks, such as segmentation and frozen probes, for the encoders of every experiment."""
