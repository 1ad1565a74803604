"""Image-text pairs for downstream tasks: questions and retrieval."""
