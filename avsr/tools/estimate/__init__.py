"""Memory, time and FLOPs of a training, planned and measured."""
