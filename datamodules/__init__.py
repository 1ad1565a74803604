"""Official on-disk layouts in, typed batches out. Knows no model."""
