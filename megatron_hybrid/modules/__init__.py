"""Layers and norms."""
