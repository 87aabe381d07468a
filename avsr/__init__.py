"""Llama-AVSR: speech recognition with frozen speech encoders, a projector and a LoRA-tuned Llama."""
