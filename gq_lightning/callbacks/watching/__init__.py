"""Callbacks that report: curves, images, advice, broken pictures, non-finite losses."""
