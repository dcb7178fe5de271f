"""Callbacks that report: curves, pictures, advice, and what went wrong."""
