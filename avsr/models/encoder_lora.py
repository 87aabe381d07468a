"""LoRA on a frozen speech encoder, by PEFT."""

from __future__ import annotations

from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from avsr.config import LoraConfig
from avsr.errors import UserError


def add_encoder_lora(module: nn.Module, config: LoraConfig, *, key: str = "lora") -> nn.Module:
    """Adds LoRA to the linear layers of ``module`` named by ``config.targets``, in place.

    Afterwards only the adapters (in float32) take gradients, and the module's output is unchanged until they are
    trained. Llama-AVSR's LoRA on AV-HuBERT is rank 64 with alpha 128 (scale 2) on q_proj and v_proj.

    Args:
        module: the frozen module. An adapter acts only where its layer is *called*, not where its weight is read.
        config: rank 0 leaves ``module`` unchanged.
        key: the config key, for messages.

    Returns:
        ``module``.

    Raises:
        UserError: a target names no linear layer of the module.
    """
    if config.rank == 0:
        return module
    linear = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    for target in config.targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise UserError(f"{key}.targets: the encoder has no linear layer {target!r}; it has {known}")
    peft_config = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
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
