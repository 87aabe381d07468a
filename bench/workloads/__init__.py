"""What is timed: model shapes, attention problems, whole training steps, and our peers' implementations."""
