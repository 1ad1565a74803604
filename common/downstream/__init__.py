"""What follows pre-training: segmentation and frozen probes, for the encoders of every experiment."""
