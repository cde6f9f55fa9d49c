"""Pretraining by DINO: Caron et al. 2021, Algorithm 1; constants as in facebookresearch/dino."""
