"""The CPU backend: C++ from csrc behind torch operators."""
