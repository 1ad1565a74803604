"""Losses as functions of tensors: no weights, float32 inside, equal on one rank and on many."""
