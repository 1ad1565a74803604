"""Formats of an exported encoder."""

from common.vit_export import FORMATS

__all__ = ["FORMATS"]
