"""The decorrelation loss and sink statistics inside ``transformers.Trainer`` and trainers made from it.

``class MyTrainer(SinkTrainerMixin, Trainer): pass`` adds weight x loss; :class:`SinkCallback` logs alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flashsink.hf import trainer_terms as terms
from flashsink.hf.probe import Probe, attach

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
    from transformers import TrainerCallback as _TrainerCallback
else:
    _Trainer = _TrainerCallback = object


class SinkTrainerMixin(_Trainer):
    """Adds the decorrelation loss, and a log of sinks and activations, to the Trainer class that follows it.

    ``class MyTrainer(SinkTrainerMixin, Trainer)``, then ``MyTrainer(model=..., args=..., decorrelation_weight=0.1)``.
    flashsink is attached to the model, PEFT-wrapped or not, from the first step of ``train()`` to its end. The loss of
    an optimizer step is

        the Trainer's own loss + decorrelation_weight * (sum over the counted tokens) / (their number)

    with sum and number over all micro-batches and ranks of the step, whatever the Trainer averages its own loss over:
    four accumulated micro-batches give the gradient of one batch of four times the size, two ranks that of one.

    Evaluation and prediction run on the plain model and give the Trainer's own loss. (With ``args.torch_compile``
    flashsink stays attached, for detaching would compile again; the loss is the Trainer's own there too.) Checkpoints
    hold nothing of flashsink.

    Added to the log, to whatever the Trainer reports to:

    * ``decorrelation_loss`` and ``lm_loss``, means over the steps since the last log as ``loss`` is:
      loss = lm_loss + decorrelation_weight * decorrelation_loss;
    * ``bos_sink_rate``, ``intermediate_sink_rate_mean`` and ``_max``: the share of heads, mean over the layers, in
      which BOS and the other tokens take more than 0.3 of the attention (the mean over the queries that may see them);
      tokens that fewer than 8 queries may see are left out;
    * ``largest_activation``, and the ``_layer`` (from 0), ``_token`` (position in its sequence, BOS = 0) and
      ``_feature`` where it is;
    * ``grad_norm_lm`` and ``grad_norm_decorrelation``, see ``gradient_norm_steps``.

    Statistics describe the last micro-batch before the log, of all ranks, and are computed when they are logged.

    Args:
        decorrelation_weight: the factor on the loss, at least 0; with 0 it is only logged.
        spans: which tokens count beside BOS. ``"prompt"``: in every sequence those before the first label that is
            not -100, as a completion-only loss leaves them. A sequence without such labels, and one whose labels begin
            with its first or second token (a loss over the whole sequence), counts whole. ``"all"``: every token.
            Or a function of the collated batch that gives (B,) integers, the number of leading tokens of every row
            (BOS included; padding does not count), or (N,) for the packed sequences of a single row; it is called twice
            for every micro-batch. Loss = 0 where nothing counts.
        decorrelation_margin: ``margin`` of :func:`flashsink.decorrelation_loss`.
        gradient_norm_steps: in every n-th step, log the norms of the gradients that the two terms have on the step's
            first micro-batches (over all ranks, times the number of accumulated ones), at the cost of two backward
            passes more; training is not changed. 0: never. Choose a multiple of ``logging_steps``.
        attach_options: further arguments of :func:`flashsink.attach`.

    Raises:
        ValueError: an argument out of range; or a Trainer that splits a sequence or a model in a way that is not
            supported: ``nn.DataParallel``, tensor, context and sequence parallelism, FSDP; PEFT's prompt learning,
            which adds tokens; ``gradient_norm_steps`` with DeepSpeed or ``torch_compile``.
    """

    def __init__(
        self,
        *args: Any,
        decorrelation_weight: float = 0.0,
        spans: terms.Spans = "prompt",
        decorrelation_margin: float = 0.0,
        gradient_norm_steps: int = 0,
        attach_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not 0.0 <= decorrelation_weight < math.inf:
            raise ValueError(f"decorrelation_weight: expected a number of at least 0, got {decorrelation_weight}")
        if spans not in ("prompt", "all") and not callable(spans):
            raise ValueError(f"spans: expected 'prompt', 'all' or a function of the batch, got {spans!r}")
        if gradient_norm_steps < 0:
            raise ValueError(f"gradient_norm_steps: expected at least 0, got {gradient_norm_steps}")
        options = {"margin": decorrelation_margin, **(attach_options or {})}
        if not options.setdefault("decorrelation", True):
            raise ValueError("attach_options: expected decorrelation=True; SinkCallback logs without the loss")
        anchors = options.get("anchors")
        if anchors is not None and not (
            isinstance(anchors, Tensor) and anchors.is_floating_point() and anchors.dim() == 2
        ):
            raise ValueError(
                "attach_options: expected anchors (L, C), one pair a token, which is what batches are counted by"
            )
        self.decorrelation_weight, self.decorrelation_spans = float(decorrelation_weight), spans
        self.gradient_norm_steps, self._sink_options = int(gradient_norm_steps), options
        self._probe: Probe | None = None
        self._attached = False
        self._counted, self._first = torch.ones(()), True  # of the step: its counted tokens, and no forward yet
        self._sums, self._steps = torch.zeros(2), 0  # since the last log: lm_loss and decorrelation_loss of this rank
        self._norms: dict[str, float] = {}
        super().__init__(*args, **kwargs)
        _check_setup(self)

    # ---- when flashsink is attached

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._forget()
        self._probe = None  # of a training before
        try:
            return super().train(*args, **kwargs)
        finally:
            self._detach()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self._attached:  # by now the model is patched, wrapped and has its weights
            _check_model(self.model)
            self._probe = attach(self.model, **self._sink_options)
            self._attached = True
        return super().training_step(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        if not _compiles(self):
            self._detach()
        return super().evaluation_loop(*args, **kwargs)

    def _detach(self) -> None:
        if self._attached and self._probe is not None:
            self._probe.detach()  # it stays readable for the log
        self._attached = False

    # ---- the loss

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        own = [terms.counted(terms.span_lengths(batch, self.decorrelation_spans)).to(device) for batch in samples]
        number = torch.stack(own).sum() if own else torch.zeros((), dtype=torch.long, device=device)
        self._counted = self.accelerator.reduce(number, "sum").clamp(min=1)
        self._steps += 1
        self._first = True
        return samples, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        given = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        if not self._attached or self._probe is None or not model.training:
            return super().compute_loss(model, inputs, **given)
        with self._probe.spans(terms.span_lengths(inputs, self.decorrelation_spans)):
            result = super().compute_loss(model, inputs, **given)
        loss, parts = result[0] if return_outputs else result, self._divisor(num_items_in_batch)
        local = self._probe.decorrelation_loss * self._probe.decorrelation_count.clamp(min=1)  # a sum over tokens
        share = (local / self._counted.to(local.device)).to(loss.device)
        # the Trainer still divides by the number of micro-batches, where it has not, and averages over the ranks
        term = self.decorrelation_weight * self.accelerator.num_processes * parts * share
        if self._first and self.gradient_norm_steps and (self.state.global_step + 1) % self.gradient_norm_steps == 0:
            self._norms = self._gradient_norms(model, loss / parts, term / parts)
        self._first = False
        with torch.no_grad():
            self._sums = self._sums.to(loss.device) + torch.stack([loss.detach().float() / parts, share.detach()])
        loss = loss + term
        return (loss, result[1]) if return_outputs else loss

    def _divisor(self, num_items_in_batch: Any) -> int:
        """What the Trainer will divide the loss of this micro-batch by."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or (
                self.compute_loss_func is not None
            )
        return 1 if scaled else self.current_gradient_accumulation_steps

    def _gradient_norms(self, model: nn.Module, *both: Tensor) -> dict[str, float]:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        logs = {}
        for name, term in zip(("lm", "decorrelation"), both, strict=True):
            square = 0.0
            if term.requires_grad:  # not the decorrelation loss where only the last layer is trained
                grads = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
                for grad, parameter in zip(grads, parameters, strict=True):
                    own = torch.zeros_like(parameter) if grad is None else grad  # another rank may have used it
                    square += float(self.accelerator.reduce(own.float(), "mean").square().sum())
            logs[f"grad_norm_{name}"] = self.current_gradient_accumulation_steps * math.sqrt(square)
        return logs

    # ---- the log

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._steps and self._probe is not None:
            logs = {**logs, **self._report(self._probe)}
        super().log(logs, *args, **kwargs)

    def _report(self, probe: Probe) -> dict[str, float]:
        values = terms.statistics(probe).to(self._sums.device)
        ranks = self.accelerator.gather(torch.cat([self._sums, values])[None])
        lm, share = ranks[:, 0].mean() / self._steps, ranks[:, 1].sum() / self._steps
        logs = {"decorrelation_loss": float(share), "lm_loss": float(lm), **terms.combined(ranks[:, 2:]), **self._norms}
        self._forget()
        return logs

    def _forget(self) -> None:
        """Begins the next period between two logs."""
        self._sums, self._steps, self._norms = torch.zeros(2), 0, {}


class _Callback(_TrainerCallback):
    """Logs a model's sinks and activations as it is trained, by any Trainer, without changing the loss.

    ``trainer.add_callback(SinkCallback(trainer))``. The entries are those of :class:`SinkTrainerMixin`, without the
    gradient norms, and with a ``decorrelation_loss`` over all valid tokens of the last micro-batch. Evaluation runs
    with flashsink attached too.

    Args:
        trainer: the Trainer, which the statistics of all ranks are gathered by.
        probe: the probe of the model where flashsink is attached already; the callback then leaves it so. Default:
            attaches flashsink from the beginning to the end of a training.
        attach_options: arguments of :func:`flashsink.attach`.
    """

    def __init__(self, trainer: _Trainer, probe: Probe | None = None, **attach_options: Any) -> None:
        if probe is not None and attach_options:
            raise ValueError(f"attach_options: expected none with a probe, got {', '.join(attach_options)}")
        _check_setup(trainer)
        self._trainer, self._options = trainer, attach_options
        self.probe, self._given = probe, probe is not None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        others = self._trainer.callback_handler.callbacks
        others.insert(0, others.pop(others.index(self)))  # before those that report what is in the log
        if not self._given:
            _check_model(self._trainer.model)
            self.probe = attach(self._trainer.model, **self._options)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs or self.probe is None:
            return
        values = terms.statistics(self.probe)
        own = torch.cat([terms.decorrelation(self.probe), values]).to(args.device)
        ranks = self._trainer.accelerator.gather(own[None])
        added, number = terms.combined(ranks[:, 2:]), float(ranks[:, 1].sum())
        if number:
            added["decorrelation_loss"] = float(ranks[:, 0].sum()) / number
        logs.update(added)
        state.log_history[-1].update(added)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.probe is not None and not self._given:
            self.probe.detach()


def __getattr__(name: str) -> Any:
    """``SinkCallback`` as a subclass of transformers' TrainerCallback, made when it is asked for."""
    if name != "SinkCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from transformers import TrainerCallback

    made = type(name, (_Callback, TrainerCallback), {"__doc__": _Callback.__doc__, "__module__": __name__})
    globals()[name] = made
    return made


def _compiles(trainer: _Trainer) -> bool:
    return trainer.accelerator.state.dynamo_plugin.backend != "NO"


def _check_setup(trainer: _Trainer) -> None:
    """Raises:
    ValueError: the Trainer runs the model in a way that flashsink cannot observe, or has not been tested with.
    """
    config = getattr(trainer.accelerator, "parallelism_config", None)
    named = {"tensor parallelism": "tp", "context parallelism": "cp", "sequence parallelism": "sp"}
    found = [kind for kind, short in named.items() if getattr(config, f"{short}_enabled", False)]
    found += ["nn.DataParallel (several GPUs in one process)"] * (trainer.args.n_gpu > 1)
    found += ["FSDP"] * trainer.is_fsdp_enabled
    if found:
        raise ValueError(f"args: expected one process per GPU, each with whole sequences and layers, got {found[0]}")
    if getattr(trainer, "gradient_norm_steps", 0):
        other = "DeepSpeed" if trainer.is_deepspeed_enabled else "torch_compile" if _compiles(trainer) else None
        if other:  # its backward can run only once for a forward
            raise ValueError(f"gradient_norm_steps: expected 0 with {other}, got {trainer.gradient_norm_steps}")


def _check_model(model: nn.Module) -> None:
    """Raises:
    ValueError: PEFT adds tokens to every sequence.
    """
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(f"model: expected PEFT without additional tokens, got prompt learning in adapter {name!r}")
