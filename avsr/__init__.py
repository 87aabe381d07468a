"""Llama-AVSR: speech recognition with frozen speech encoders, a projector and a LoRA-tuned Llama."""

from avsr.runtime.machine import spin_briefly

spin_briefly()  # here, since every entry point comes by, and before it imports torch
