"""The console script ``avsr``."""

from __future__ import annotations

import argparse
import logging
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avsr.errors import EXIT_USER, UserError, guarded, visible
from avsr.runtime.share import Share


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


def _split(given: list[str]) -> tuple[list[str], list[str]]:
    """Names and ``key=value`` overrides; what exists is a name even with a "="."""
    names: list[str] = []
    overrides: list[str] = []
    for text in given:
        (names if "=" not in text or Path(text).exists() else overrides).append(text)
    return names, overrides


def _train(arguments: argparse.Namespace) -> None:
    from avsr.config import load_config
    from avsr.training.run import train_and_leave

    print(train_and_leave(load_config(arguments.config, arguments.overrides)))


def _profile(arguments: argparse.Namespace) -> None:
    from avsr.config import load_config
    from avsr.tools.estimate.profiling import profile_and_leave

    profile_and_leave(load_config(arguments.config, arguments.overrides), arguments.steps)


def _plan(arguments: argparse.Namespace) -> None:
    from avsr.config import load_config
    from avsr.tools.estimate.planning import page, plan
    from avsr.training.memory import device_memory

    config = load_config(arguments.config, arguments.overrides)
    room = device_memory() if arguments.memory is None else arguments.memory * 1e9
    print(page(config, plan(config, arguments.ranks, room), room))


def _pretrain(arguments: argparse.Namespace) -> None:
    from avsr.config.composing import compose
    from avsr.tools.lipreader.pretrain import PretrainConfig, pretrain

    print(pretrain(compose(arguments.config, arguments.overrides, PretrainConfig)))


def _evaluate(arguments: argparse.Namespace) -> None:
    from avsr.evaluation.run import evaluate, score_lines

    scores = evaluate(arguments.run, arguments.overrides, arguments.checkpoint, arguments.out)
    print("\n".join(score_lines(scores)))


def _transcribe(arguments: argparse.Namespace) -> None:
    from avsr.evaluation.transcripts import transcribe_files

    names, overrides = _split(arguments.files)
    if not names:
        raise UserError("transcribe: no file given")
    failed = 0
    for name, result in transcribe_files(arguments.run, names, overrides, arguments.out, _share(arguments)):
        if isinstance(result, UserError):
            failed += 1
            print(f"avsr: {visible(str(result))}", file=sys.stderr)
        else:
            print(f"{visible(name)}\t{visible(result)}", flush=True)
    if failed:
        raise SystemExit(EXIT_USER)


def _act_search(arguments: argparse.Namespace) -> None:
    from avsr.evaluation.act_search import act_search

    print(act_search(arguments.run, arguments.overrides, arguments.checkpoint))


def _analyze(arguments: argparse.Namespace) -> None:
    from avsr.tools.analysis.composite import AUDIO, IMAGE, Media
    from avsr.tools.analyze import analyze

    targets, overrides = _split(arguments.targets)
    if not targets:
        raise UserError("analyze: no run or model given")
    given = [(kind, file) for kind in (AUDIO, IMAGE) if (file := getattr(arguments, kind)) is not None]
    if len(given) > 1:
        raise UserError("analyze: expected --audio or --image, got both")
    print(analyze(targets, overrides, arguments.out, arguments.text, Media(*given[0]) if given else None))


def _import(arguments: argparse.Namespace) -> None:
    from avsr.tools.importing import import_checkpoint

    given = arguments.checkpoint, arguments.config, arguments.out, arguments.overrides
    print(import_checkpoint(*given, reduction=arguments.reduction, alpha=arguments.alpha))


def _average(arguments: argparse.Namespace) -> None:
    from avsr.tools.average import average

    print(average(arguments.run, arguments.last))


def _doctor(arguments: argparse.Namespace) -> None:
    from avsr.tools.doctor import report

    lines, complete = report()
    print("\n".join(lines))
    if not complete:
        raise SystemExit(1)


def _synth(arguments: argparse.Namespace) -> None:
    from avsr.tools.corpora.synth.corpus import parse_options, synthesise

    share = _share(arguments)
    options = parse_options(arguments.overrides)
    for name, count in synthesise(Path(arguments.out), options, share, merge=arguments.merge).items():
        print(f"{count:7d}  {name}")
    _print_share(share)


def _prepare(arguments: argparse.Namespace) -> None:
    from avsr.tools.corpora.prepare.options import parse_options
    from avsr.tools.corpora.prepare.run import REFUSED, prepare

    share = _share(arguments)
    options = parse_options(arguments.corpus, arguments.overrides)
    report = prepare(arguments.corpus, arguments.root, arguments.out, options, share, merge=arguments.merge)
    for name, count in report.manifests.items():
        print(f"{count:7d}  {name}.jsonl")
    for kind, count in report.refused.items():
        print(f"{count:7d}  refused: {kind}")
    _print_share(share)
    if report.refused and share is None:
        print(f"the reasons are in {Path(arguments.out, REFUSED)}")


def _index(arguments: argparse.Namespace) -> None:
    from avsr.tools.index import index_manifest

    options = {"media": not arguments.lines, "workers": arguments.workers, "share": _share(arguments)}
    print("\n".join(index_manifest(arguments.manifest, **options)))


def _share(arguments: argparse.Namespace) -> Share | None:
    """What ``--shard`` says."""
    if arguments.shard is not None and getattr(arguments, "merge", False):
        raise UserError("expected --shard I/N or --merge, got both")
    return None if arguments.shard is None else Share.parse(arguments.shard)


def _print_share(share: Share | None) -> None:
    if share is not None:
        print(f"shard {share} is done; when all {share.count} are, --merge instead of --shard writes the manifests")


def _pack(arguments: argparse.Namespace) -> None:
    from avsr.tools.pack import pack

    options = {"size": arguments.size, "clips": arguments.clips, "absolute": arguments.allow_absolute}
    packed = pack(arguments.manifest, arguments.out, **options)
    print(f"{packed.lines:7d}  {Path(arguments.manifest).stem}.jsonl")
    print(f"{packed.shards:7d}  shards, {packed.written} of them written now")


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
    "train": _Command(_train, "train a config", [_CONFIG, _OVERRIDES], _KEYS),
    "profile": _Command(
        _profile,
        "measure a few steps of a config: speed, time and memory by part",
        [_CONFIG, _argument("--steps", type=int, default=10, help="steps that are measured"), _OVERRIDES],
        _KEYS,
    ),
    "plan": _Command(
        _plan,
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
        _pretrain,
        "train the small visual encoder on a corpus with known times",
        [_CONFIG, _OVERRIDES],
        _PRETRAIN_KEYS,
    ),
    "evaluate": _Command(
        _evaluate,
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
        _transcribe,
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
        _act_search,
        "find the heads that attention calibration (act.beta) helps",
        [_RUN, _CHECKPOINT, _OVERRIDES],
        _KEYS,
    ),
    "analyze": _Command(
        _analyze,
        "write analysis.json and report.html of runs or language models",
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
            _path(
                "--out",
                help="folder of the report (default: as evaluate's, of the first run, or runs/analysis/NAME)",
            ),
        ],
    ),
    "average": _Command(
        _average,
        "write the mean of a run's newest checkpoints as checkpoints/average",
        [
            _path("run", help="the run folder, trained with training.keep_last"),
            _argument("--last", type=int, default=0, metavar="N", help="the newest N (default: all that are kept)"),
        ],
    ),
    "import": _Command(
        _import,
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
    "doctor": _Command(_doctor, "print versions, devices, backends and what is missing"),
    "index": _Command(
        _index,
        "parse a manifest and measure its clips once for all runs, and describe it",
        [
            _path("manifest", help="a .jsonl manifest or a label CSV"),
            _argument("--lines", action="store_true", help="parse its lines only; read no clip"),
            _argument("--workers", type=int, default=0, help="processes (default: one for each CPU)"),
            _argument("--shard", metavar="I/N", help="measure the I-th of N shares of the clips; the last joins them"),
        ],
    ),
    "synth": _Command(
        _synth,
        "make a corpus of synthetic speech",
        [_path("out", help="the folder to create"), *_SHARES, _OVERRIDES],
        _SYNTH_KEYS,
    ),
    "prepare": _Command(
        _prepare,
        "turn the videos of a corpus into mouth crops, sound and manifests",
        [
            _argument("corpus", help="lrs2, lrs3, vox2, muavic or videos (a folder of your own)"),
            _path("root", help="the corpus as it was distributed"),
            _path("out", help="the folder to create"),
            *_SHARES,
            _OVERRIDES,
        ],
        _PREPARE_KEYS,
    ),
    "pack": _Command(
        _pack,
        "put the clips of a manifest into a few large tar files, read as fast at random",
        [
            _path("manifest", help="of the clips"),
            _path("out", help="the folder to create: NAME-000000.tar ..., NAME.jsonl"),
            _argument("--size", type=float, default=1.0, metavar="GB", help="of a full tar (default: 1)"),
            _argument("--clips", type=int, default=0, metavar="N", help="lines in a tar (default: any number)"),
            _argument("--allow-absolute", action="store_true", help="the manifest may name files anywhere"),
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
