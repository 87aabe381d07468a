"""Finds and crops the mouth in a video of a face."""
