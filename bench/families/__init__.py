"""Every class of transformers' auto mappings with flashsink attached, against the same class without.

A class is built from a shrunk config with random weights (``shrink``, ``build``), called in every way that may change
what attention sees (``inputs``, ``cells``), once plain and once attached, and compared (``oracle``, ``judge``).
``python -m bench.families`` does all of them in worker processes, goes on where it stopped, and writes a table.
"""
