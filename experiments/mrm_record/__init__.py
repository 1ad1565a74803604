"""Masked record modeling: radiographs and their reports (Zhou et al., ICLR 2023)."""
