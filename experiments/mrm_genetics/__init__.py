"""Masked relation modeling: images with genetics (Yang et al., ICCV 2023)."""
