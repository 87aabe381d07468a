"""LoRA on a frozen speech encoder, by PEFT."""

from __future__ import annotations

from collections.abc import Collection

from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from avsr.config import LoraConfig
from avsr.models.lora_targets import adapted_layers


def add_encoder_lora(
    module: nn.Module, config: LoraConfig, *, key: str = "lora", unused: Collection[str] = ()
) -> nn.Module:
    """Adds LoRA to the linear layers of ``module`` named by ``config.targets``, in place.

    Afterwards only the adapters (in float32) take gradients, and the module's output is unchanged until they are
    trained. Llama-AVSR's LoRA on AV-HuBERT is rank 64 with alpha 128 (scale 2) on q_proj and v_proj.

    Args:
        module: the frozen module. An adapter acts only where its layer is *called*, not where its weight is read.
        config: rank 0 leaves ``module`` unchanged.
        key: the config key, for messages.
        unused: names of parts whose layers are never called.

    Returns:
        ``module``.

    Raises:
        UserError: a target names no linear layer of the module.
    """
    if config.rank == 0:
        return module
    peft_config = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=adapted_layers(module, config.targets, f"{key}.targets", "encoder", unused),
    )
    inject_adapter_in_model(peft_config, module)
    for parameter in module.parameters():
        if parameter.requires_grad:  # PEFT leaves only the adapters trainable
            parameter.data = parameter.data.float()
    set_lora_mode(module.eval(), False)
    return module


def set_lora_mode(module: nn.Module, training: bool) -> None:
    """Switches only the adapters' dropout; everything frozen stays in eval mode."""
    for part in module.modules():
        if isinstance(part, LoraLayer):
            part.lora_dropout.train(training)
