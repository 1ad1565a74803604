"""Formats of an exported encoder."""

from common.weights.vit_export import FORMATS

__all__ = ["FORMATS"]
