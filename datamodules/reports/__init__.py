"""Images with reports or captions, for pre-training, and their official layouts."""
