"""Finding the mouth in a video of a face."""
