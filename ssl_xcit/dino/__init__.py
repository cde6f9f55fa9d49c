"""DINO pretraining: Caron et al. 2021, Algorithm 1, with the constants of facebookresearch/dino."""
