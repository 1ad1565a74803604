"""Commands about an archive: examine it, prepare its cache, split it, measure it."""
