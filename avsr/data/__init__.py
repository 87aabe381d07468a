"""Manifests, audio, features and batches."""
