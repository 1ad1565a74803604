"""Lightning callbacks, one class per file."""
