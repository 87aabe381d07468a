"""flashsink inside Hugging Face models."""
