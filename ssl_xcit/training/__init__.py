"""The engine of every training."""
