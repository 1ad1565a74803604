"""BrainMVP: Multi-modal Vision Pre-training for Brain Multi-parametric MRI (Rui et al., CVPR 2025).

Implemented: cross-modal reconstruction, modality template distillation and modality-aware contrast; the 3D UniFormer
and the UNet; the presets ``paper`` and ``upstream``; segmentation with channels replaced by templates, deep supervision
and the consistency term, scored under every subset of missing sequences; classification; released weights. Not
implemented: offline registration and skull-stripping of raw scans, which other tools do.
"""
