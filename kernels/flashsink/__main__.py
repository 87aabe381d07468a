"""``python -m flashsink``: what can run here and whether it computes rightly, a demonstration on a toy model, and a
model's sinks over a text. One function per subcommand."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

import flashsink
from flashsink import dispatch, selfcheck, verdicts, versions
from flashsink.hf import analyze as analysis

BOS, DELIMITER, VOCABULARY = 0, 1, 64
ROWS, TOKENS, PLACE = 4, 40, 12  # PLACE: the delimiter's position
FEATURE, SHARED = 7, 21  # of the massive activations, and of all tokens
EPS, MIN_QUERIES = 0.3, 8
CHECKED = ("cpu", "triton", "sdpa")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line and status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m flashsink", description="Attention that measures its own sinks.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser(
        "backends", help="which backends are usable, or why not, and the versions of packages"
    )
    command.set_defaults(run=backends)

    command = commands.add_parser("check", help="whether the kernels compute rightly on this device; remembered")
    command.add_argument("--backend", choices=CHECKED, help="default: all of them")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=check)

    command = commands.add_parser("demo", help="measure and remove a planted sink in a toy model (10 s on a CPU)")
    command.add_argument(
        "--steps",
        type=functools.partial(_at_least, least=0),
        default=80,
        metavar="N",
        help="optimizer steps (default 80)",
    )
    command.add_argument("--weight", type=float, default=10.0, help="of the decorrelation loss (default 10)")
    command.set_defaults(run=demo)

    command = commands.add_parser("analyze", help="sinks and largest activations of a Hugging Face model over a text")
    command.add_argument("name", metavar="MODEL", help="a hub id or a folder: a causal language model or an encoder")
    command.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text")
    command.add_argument("--device", help="such as cuda:1 (default: cuda where there is one)")
    command.add_argument("--dtype", choices=analysis.DTYPES, help="default: float32 on the CPU, else the file's own")
    command.add_argument(
        "--rows",
        type=functools.partial(_at_least, least=1),
        default=8,
        metavar="N",
        help="rows of text, at most (default 8)",
    )
    command.add_argument(
        "--tokens",
        type=functools.partial(_at_least, least=2),
        default=512,
        metavar="N",
        help="tokens of a row (default 512)",
    )
    command.add_argument(
        "--out",
        type=_out,
        action="append",
        default=[],
        metavar="FILE",
        help=".json: all numbers; .png, .svg: the first row",
    )
    command.add_argument("--module", metavar="NAME", help="the submodule to observe, such as audio_tower")
    command.set_defaults(run=analyze)

    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ImportError, analysis.Refused) as error:
        print(f"{parser.prog}: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1


def backends(_: argparse.Namespace) -> int:
    """Prints every backend with its state, then packages with their versions, then the device."""
    rows = [("backend", name, state) for name, state in flashsink.backends().items()]
    for package in versions.TESTED:
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed = "not installed"
        rows.append(("package", package, versions.outside(package) or installed))
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        rows.append(("device", "cuda", f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"))
    rows.append(("device", "cpu", f"{platform.machine()}, {torch.get_num_threads()} threads"))
    _print_table([("kind", "name", "state"), *rows])
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Solves the problems of :mod:`flashsink.selfcheck` anew by every backend and prints a row for each of its kernels.
    The status is 1 where one fails, or the named backend cannot run."""
    found = []
    for name in [arguments.backend] if arguments.backend else CHECKED:
        for row in _checked(name):
            found.append(row)
            if not arguments.json:
                print(f"{name:6s}  {row['kernel']:42s}  {row['seconds']:7.1f} s  {row['state']}", flush=True)
    if arguments.json:
        releases = {"flashsink": flashsink.__version__, "torch": torch.__version__}
        print(json.dumps(releases | {"checks": found}, indent=1))
    absent = [row for row in found if row["kernel"] == "-"]
    return int(any(row["state"] != "right" for row in found if row not in absent) or bool(arguments.backend and absent))


def _checked(name: str) -> Iterator[dict[str, Any]]:
    """What is known of every kernel of a backend as it becomes known; one row without a kernel where it cannot run."""
    state, cuda = flashsink.backends()[name], torch.cuda.is_available()
    if name == "sdpa" and not cuda:
        state = "on the CPU it is the cpu backend"
    if state != "usable":
        yield {"backend": name, "kernel": "-", "seconds": 0.0, "state": state}
        return
    device = torch.device("cuda", torch.cuda.current_device()) if name != "cpu" and cuda else torch.device("cpu")
    run = dispatch.module(name)
    for kernel in selfcheck.kernels():
        attends = kernel.family in selfcheck.ATTENTION
        # Triton's interpreter computes bfloat16 wrongly; what sdpa does not list is the triton backend's
        if (name == "triton" and device.type == "cpu" and kernel.dtype == torch.bfloat16) or (
            name == "sdpa" and kernel.family not in ("attention", "statistics")
        ):
            continue
        if attends and run.refusal(torch.empty(1, 1, 1, kernel.size, dtype=kernel.dtype, device=device)):
            continue
        began = time.monotonic()
        try:
            reason = selfcheck.wrong(run, kernel, device)
            if name == "triton":
                verdicts.remember(device, kernel, reason)
        except RuntimeError as error:
            reason = f"not checked: {str(error).splitlines()[0]}"
        seconds = round(time.monotonic() - began, 2)
        yield {"backend": name, "kernel": str(kernel), "seconds": seconds, "state": reason or "right"}


def demo(arguments: argparse.Namespace) -> int:
    """Attaches flashsink to a toy Llama, prints its sinks, trains with the decorrelation loss and prints them again."""
    torch.manual_seed(0)
    model = toy_model()
    ids = torch.randint(2, VOCABULARY, (ROWS, TOKENS))
    ids[:, 0], ids[:, PLACE] = BOS, DELIMITER
    probe = flashsink.attach(model)
    print(
        "A toy: a random Llama of 4 layers with a sink planted at BOS and another at a delimiter. It shows what is\n"
        f"measured, not what a trained model does. A sink receives more than {EPS} on average from the queries that\n"
        f"see it, at least {MIN_QUERIES}; numbers are means over layers, heads and rows."
    )
    _print_measures("before", *measure(model, probe, ids))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(arguments.steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        (loss + arguments.weight * probe.decorrelation_loss).backward()
        optimizer.step()
    _print_measures(f"after {arguments.steps} steps", *measure(model, probe, ids))
    probe.detach()
    return 0


def analyze(arguments: argparse.Namespace) -> int:
    """Prints a row for every layer, from 0, and writes what ``--out`` names."""
    given = {key: value for key, value in vars(arguments).items() if key != "run"}
    held, rows = analysis.run(analysis.Options(**given | {"out": tuple(arguments.out)}))
    _print_table(rows)
    loss = held["decorrelation_loss"]
    print(f"{held['rows']} rows, {held['tokens']} tokens; decorrelation loss {'-' if loss is None else f'{loss:.4f}'}")
    if held["first_nonfinite"] is not None:
        print(
            "not finite: layer {layer}, {block}, row {row}, token {token}, feature {feature}: {value}".format(
                **held["first_nonfinite"]
            )
        )
    return 0


def toy_model() -> Any:
    """A random Llama in which BOS and the delimiter share a massive activation that all queries attend to.

    Their embeddings are large in ``FEATURE``, which every key projects to the slowest rotary dimension; all embeddings
    have a little of ``SHARED``, which every query projects there.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, bos_token_id=BOS, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight.normal_(0, 0.3)
        embeddings[:, SHARED] = 1.0
        embeddings[[BOS, DELIMITER], FEATURE] = 40.0
        for layer in model.model.layers:
            attention = layer.self_attn
            size = attention.head_dim
            attention.q_proj.weight[size - 1 :: size, SHARED] = 2.0
            attention.k_proj.weight[size - 1 :: size, FEATURE] = 1.0
    return model


def measure(model: Any, probe: flashsink.Probe, ids: Tensor) -> tuple[float, list[tuple[str, ...]]]:
    """The decorrelation loss, and sink rate, mean received attention, largest activation and cosine to BOS, averaged
    over layers, heads and rows, of BOS, the delimiter and the other positions that enough queries see."""
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[1:-1]
    states = torch.stack(hidden)  # (L - 1, B, S, C)
    cosine = torch.cosine_similarity(states, states[:, :, :1], dim=-1).mean(dim=(0, 1))
    sinks = probe.sinks
    columns = [
        torch.stack([stats.sink_rate(EPS, MIN_QUERIES) for stats in sinks]).mean(dim=(0, 1)),
        torch.stack([stats.mean_received.mean(dim=1) for stats in sinks]).mean(dim=(0, 1)),
        probe.activations.max_abs.mean(dim=(0, 1)),
        cosine,
    ]
    others = [i for i in range(1, ids.shape[1] - MIN_QUERIES + 1) if i != PLACE]
    groups: list[list[int]] = [[0], [PLACE], others]
    rows = [tuple(f"{float(column[group].mean()):.2f}" for column in columns) for group in groups]
    return float(probe.decorrelation_loss), rows


def _at_least(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a number of {least} or more, got {text!r}")
    return int(text)


def _out(text: str) -> str:
    if not text.endswith((".json", *analysis.PICTURES)):
        raise argparse.ArgumentTypeError(f"expected a file that ends in .json, .png or .svg, got {text!r}")
    return text


def _print_measures(when: str, loss: float, rows: Sequence[tuple[str, ...]]) -> None:
    print(f"\n{when}: decorrelation loss {loss:.4f}")
    names = ["0 (BOS)", f"{PLACE} (delimiter)", "others"]
    header = ("position", "sink rate", "mean received", "max |h|", "cos to BOS")
    _print_table([header, *((name, *row) for name, row in zip(names, rows, strict=True))])


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
