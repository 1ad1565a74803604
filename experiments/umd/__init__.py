"""UMD: unified medical image-text pre-training, target-data calibration and gradient coordination."""
