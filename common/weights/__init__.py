"""Encoders in and out: export, conversion, and the key maps of other libraries."""
