"""Operators with a plain definition and faster implementations."""
