"""The console script ``avsr``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from avsr.errors import UserError

EXIT_USER = 2
EXIT_INTERRUPTED = 130


@contextmanager
def guarded() -> Iterator[None]:
    """Turns what a user can mend into one line on stderr and an exit status, without a traceback."""
    try:
        yield
    except UserError as error:
        print(f"avsr: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER) from None
    except KeyboardInterrupt:
        print("avsr: interrupted", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None


def main(argv: list[str] | None = None) -> None:
    """Runs one command: train, evaluate, transcribe, analyze, synth or doctor."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("httpx", "matplotlib", "absl"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with guarded():
        arguments.run_command(arguments)


def _train(arguments: argparse.Namespace) -> None:
    from avsr.config import load_config
    from avsr.train import train
    from avsr.training.trainer import Interrupted

    try:
        run = train(load_config(arguments.config, arguments.overrides))
    except Interrupted:
        print("avsr: stopped; continue with resume=true", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
    print(run)


def _synth(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from avsr.synth.corpus import parse_options, synthesise

    for name, count in synthesise(Path(arguments.out), parse_options(arguments.overrides)).items():
        print(f"{count:7d}  {name}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="avsr", description="Llama-AVSR without attention sinks")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train a config")
    train.add_argument("config", help="a YAML file or a recipe's name")
    _add(train, _train)
    synth = commands.add_parser("synth", help="make a corpus of synthetic speech")
    synth.add_argument("out", help="the folder to make")
    _add(synth, _synth)
    return parser


def _add(parser: argparse.ArgumentParser, command: object) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.set_defaults(run_command=command)


if __name__ == "__main__":
    main()
