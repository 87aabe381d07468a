"""Encoders, compression, projector, the language model and their composition."""
