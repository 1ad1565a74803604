"""Reading, caching and cropping 2D images."""
