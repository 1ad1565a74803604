"""E-MIM: Enhanced Masked Image Modeling to Avoid Model Collapse on Multi-modal MRI (Han et al.).

Implemented: the hybrid mask pattern, pyramid Barlow Twins in the paper's position form and in the classical feature
form, the literal equations as an overlay, MAE and SimMIM baselines on the same encoder, UNETR segmentation, linear
probes, and the collapse diagnostics. Not implemented: the GAN prototype of the public code, which the paper does not
have, and the challenge server's 219 unlabelled test cases.
"""
