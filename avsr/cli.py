"""The console script ``avsr``."""

from __future__ import annotations

import argparse
import logging
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from avsr import commands
from avsr.errors import guarded, visible


def main(argv: list[str] | None = None) -> None:
    """Runs one command; ``avsr --help`` lists them."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse does not find positional arguments that follow an option
    following = getattr(arguments, "overrides", getattr(arguments, "targets", None))
    if any(text.startswith("-") for text in rest) or rest and following is None:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if following is not None:
        following += rest
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Visible("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in ("httpx", "matplotlib", "absl"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with guarded():
        arguments.run_command(arguments)


class _Visible(logging.Formatter):
    """Lines that may quote names of files leave the terminal as it is."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), "\n\t")


def _argument(*flags: str, **options: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return flags, options


def _path(*flags: str, **options: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """An argument that is a path; the shell expands no ``~`` in ``--out=~/x``."""
    return _argument(*flags, type=os.path.expanduser, **options)


_CONFIG = _path("config", help="a YAML file or a recipe's name")
_RUN = _path("run", help="the run folder")
_CHECKPOINT = _argument("--checkpoint", default="best", help="best, last, average or step-NNNNNN")
_OVERRIDES = _argument("overrides", nargs="*", metavar="key=value")
_SHARES = [
    _argument(
        "--shard", metavar="I/N", help="do the I-th of N shares of the work, such as 3/16; other hosts do the rest"
    ),
    _argument("--merge", action="store_true", help="write the manifests of what all shards have made"),
]
_KEYS, _PRETRAIN_KEYS = "avsr.config:Config", "avsr.tools.lipreader.pretrain:PretrainConfig"
_SYNTH_KEYS, _PREPARE_KEYS = (
    "avsr.tools.corpora.synth.options:SynthOptions",
    "avsr.tools.corpora.prepare.options:PrepareOptions",
)


@dataclass(frozen=True)
class _Command:
    """One command; ``keys`` is where the dataclass of its ``key=value`` arguments is."""

    run: Callable[[argparse.Namespace], None]
    help: str
    arguments: Sequence[tuple[tuple[str, ...], dict[str, Any]]] = ()
    keys: str = ""


_COMMANDS = {
    "train": _Command(commands.run_train, "train a config", [_CONFIG, _OVERRIDES], _KEYS),
    "profile": _Command(
        commands.run_profile,
        "measure a few steps of a config: speed, time and memory by part",
        [_CONFIG, _argument("--steps", type=int, default=10, help="steps that are measured"), _OVERRIDES],
        _KEYS,
    ),
    "plan": _Command(
        commands.run_plan,
        "estimate a config's memory for every ZeRO stage, and the batches that fit",
        [
            _CONFIG,
            _argument("--ranks", type=int, default=1, help="devices (default: 1)"),
            _argument("--memory", type=float, metavar="GB", help="of a device (default: this one's)"),
            _OVERRIDES,
        ],
        _KEYS,
    ),
    "pretrain": _Command(
        commands.run_pretrain,
        "train the small visual encoder on a corpus with known times",
        [_CONFIG, _OVERRIDES],
        _PRETRAIN_KEYS,
    ),
    "evaluate": _Command(
        commands.run_evaluate,
        "decode and score a run's test sets",
        [
            _RUN,
            _CHECKPOINT,
            _path(
                "--out",
                metavar="FOLDER",
                help="of the results (default: the run's for its own settings, else RUN/evaluations/SETTINGS)",
            ),
            _OVERRIDES,
        ],
        _KEYS,
    ),
    "transcribe": _Command(
        commands.run_transcribe,
        "print one line of text for each sound or video file, or clip of a manifest",
        [
            _RUN,
            _path(
                "files",
                nargs="+",
                metavar="FILE",
                help="sound or video files, quoted patterns of them ('clips/**/*.wav'), or one manifest (.jsonl, .csv) "
                "whose texts are not read; and key=value overrides",
            ),
            _path(
                "--out",
                metavar="FOLDER",
                help="write transcripts.jsonl there, too, of a manifest one with these texts, and go on after a stop; "
                "without it nothing is kept",
            ),
            _argument("--shard", metavar="I/N", help="only the I-th of every N clips"),
        ],
        _KEYS,
    ),
    "act-search": _Command(
        commands.run_act_search,
        "find the heads that attention calibration (act.beta) helps",
        [_RUN, _CHECKPOINT, _OVERRIDES],
        _KEYS,
    ),
    "analyze": _Command(
        commands.run_analyze,
        "write analysis.json and report.html of runs, language models or speech encoders",
        [
            _path(
                "targets",
                nargs="+",
                metavar="TARGET",
                help="run folders, or language models (hub id, folder, .gguf, package:NAME/path) that read plain text; "
                "and key=value: of a run's config, or of a model model.llm.bos_token=TOKEN, "
                "model.llm.eos_token=TOKEN, limit=N",
            ),
            _path("--text", metavar="FILE", help="one text per line, for models (default: 100 fixed sentences)"),
            _path("--audio", metavar="FILE", help="sound for a speech language model, in its own chat template"),
            _path("--image", metavar="FILE", help="a picture for a vision language model, likewise"),
            _argument(
                "--encoder",
                action="store_true",
                help="targets are speech encoders, whisper:NAME, wavlm:NAME or avhubert:NAME (NAME: hub id, folder, "
                "file, package:NAME/path); key=value: limit=N clips, stream=audio, video or fused of AV-HuBERT",
            ),
            _path(
                "--manifest",
                metavar="FILE",
                help="the clips that encoders read, without their texts; of 1 s or more",
            ),
            _path(
                "--out",
                help="folder of the report (default: as evaluate's, of the first run, or runs/analysis/NAME)",
            ),
        ],
    ),
    "average": _Command(
        commands.run_average,
        "write the mean of a run's newest checkpoints as checkpoints/average",
        [
            _path("run", help="the run folder, trained with training.keep_last"),
            _argument("--last", type=int, default=0, metavar="N", help="the newest N (default: all that are kept)"),
        ],
    ),
    "import": _Command(
        commands.run_import,
        "make a run from an official Llama-AVSR checkpoint",
        [
            _path("checkpoint", help="model_avg_N.pth"),
            _path("--config", required=True, help="a YAML file or a recipe's name that describes it"),
            _path("--out", required=True, help="the run folder to create"),
            _argument("--reduction", type=int, metavar="R", help="its --reduction_lora, instead of model.lora"),
            _argument("--alpha", type=float, metavar="A", help="its --alpha: LoRA is scaled by A / R"),
            _OVERRIDES,
        ],
        _KEYS,
    ),
    "doctor": _Command(commands.run_doctor, "print versions, devices, backends and what is missing"),
    "index": _Command(
        commands.run_index,
        "parse a manifest and measure its clips once for all runs, and describe it",
        [
            _path("manifest", help="a .jsonl manifest or a label CSV"),
            _argument("--lines", action="store_true", help="parse its lines only; read no clip"),
            _argument("--workers", type=int, default=0, help="processes (default: one for each CPU)"),
            _argument("--shard", metavar="I/N", help="measure the I-th of N shares of the clips; the last joins them"),
        ],
    ),
    "synth": _Command(
        commands.run_synth,
        "make a corpus of synthetic speech",
        [_path("out", help="the folder to create"), *_SHARES, _OVERRIDES],
        _SYNTH_KEYS,
    ),
    "prepare": _Command(
        commands.run_prepare,
        "turn a corpus into mouth crops, sound and manifests",
        [
            _argument("corpus", help="lrs2, lrs3, vox2, muavic, videos (a folder of your own) or debian-speech"),
            _path(
                "targets",
                nargs="+",
                metavar="FOLDER",
                help="ROOT, the corpus as it was distributed, and OUT, the folder to create; of debian-speech, human "
                "English without videos out of packages of Debian, OUT alone; and key=value options",
            ),
            *_SHARES,
        ],
        _PREPARE_KEYS,
    ),
    "pack": _Command(
        commands.run_pack,
        "put the clips of a manifest into a few large tar files, read as fast at random",
        [
            _path("manifest", help="of the clips"),
            _path("out", help="the folder to create: NAME-000000.tar ..., NAME.jsonl"),
            _argument("--size", type=float, default=1.0, metavar="GB", help="of a full tar (default: 1)"),
            _argument("--clips", type=int, default=0, metavar="N", help="lines in a tar (default: any number)"),
            _argument("--allow-absolute", action="store_true", help="the manifest may name files anywhere"),
            *_SHARES,
        ],
    ),
}


class _HelpKeys(argparse.Action):
    """Prints the keys of a command and exits, like ``--help``."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from avsr.config.reference import help_text

        try:
            print(help_text(pkgutil.resolve_name(self.const)), flush=True)
        except BrokenPipeError:  # the reader, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="avsr", description="Llama-AVSR without attention sinks")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        own = commands.add_parser(name, help=command.help)
        for flags, options in command.arguments:
            own.add_argument(*flags, **options)
        if command.keys:
            own.add_argument(
                "--help-keys",
                action=_HelpKeys,
                nargs=0,
                const=command.keys,
                default=argparse.SUPPRESS,
                help="print all keys with type, default, help and allowed values, and exit",
            )
        own.set_defaults(run_command=command.run)
    return parser


if __name__ == "__main__":
    main()
