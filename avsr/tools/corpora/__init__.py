"""Readers of the directory and label formats of talking-face corpora: what clips there are and what is said."""
