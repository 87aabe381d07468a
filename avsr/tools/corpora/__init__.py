"""Corpora: readers of folders and labels, ``prepare``, which cuts clips, and ``synth``, which makes a corpus."""
