"""Supervised training with the same engine."""
