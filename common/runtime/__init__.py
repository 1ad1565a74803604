"""The environment of a run: loggers, provenance, messages, the data section of a configuration."""
