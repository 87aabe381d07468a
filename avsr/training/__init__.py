"""The DeepSpeed training loop."""
