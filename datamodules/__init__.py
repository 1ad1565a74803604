"""Official on-disk layouts in, typed batches out; independent of any model."""
