"""flashsink inside Hugging Face models, and inside the trainers that train them."""

from typing import Any

__all__ = ["SinkCallback", "SinkTrainerMixin"]


def __getattr__(name: str) -> Any:
    """What belongs to transformers' Trainer is imported when it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flashsink.hf import trainer

    return getattr(trainer, name)
