"""Weights in files: saved, read, recognised, converted."""
