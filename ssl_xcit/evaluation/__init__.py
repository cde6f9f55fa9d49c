"""Evaluations of frozen and of supervised networks."""
