"""Pretraining of the small visual encoder."""
