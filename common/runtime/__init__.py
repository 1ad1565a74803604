"""What surrounds a run: loggers, provenance, messages, the data section of a configuration."""
