"""The console script ``avsr``."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from avsr.errors import EXIT_USER, UserError, guarded


def main(argv: list[str] | None = None) -> None:
    """Runs one command; ``avsr --help`` lists them."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse does not find positional arguments that stand behind an option
    behind = getattr(arguments, "overrides", getattr(arguments, "targets", None))
    if any(text.startswith("-") for text in rest) or rest and behind is None:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if behind is not None:
        behind += rest
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("httpx", "matplotlib", "absl"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with guarded():
        arguments.run_command(arguments)


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
    from avsr.evaluation.run import evaluate

    for name, score in evaluate(arguments.run, arguments.overrides, arguments.checkpoint).items():
        print(f"{name}: WER {score.wer:.4f}  CER {score.cer:.4f}  ({score.utterances} utterances, {score.words} words)")


def _transcribe(arguments: argparse.Namespace) -> None:
    from avsr.evaluation.run import transcribe_files

    names = [name for name in arguments.files if "=" not in name or Path(name).exists()]
    overrides = [name for name in arguments.files if name not in names]
    if not names:
        raise UserError("transcribe: no file given")
    failed = 0
    for name, result in transcribe_files(arguments.run, names, overrides):
        if isinstance(result, UserError):
            failed += 1
            print(f"avsr: {result}", file=sys.stderr)
        else:
            print(f"{name}\t{result}")
    if failed:
        raise SystemExit(EXIT_USER)


def _act_search(arguments: argparse.Namespace) -> None:
    from avsr.evaluation.act_search import act_search

    print(act_search(arguments.run, arguments.overrides, arguments.checkpoint))


def _analyze(arguments: argparse.Namespace) -> None:
    from avsr.tools.analyze import analyze

    targets = [name for name in arguments.targets if "=" not in name or Path(name).exists()]
    overrides = [name for name in arguments.targets if name not in targets]
    if not targets:
        raise UserError("analyze: no run or model given")
    print(analyze(targets, overrides, arguments.out, arguments.text))


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

    for name, count in synthesise(Path(arguments.out), parse_options(arguments.overrides)).items():
        print(f"{count:7d}  {name}")


def _prepare(arguments: argparse.Namespace) -> None:
    from avsr.tools.corpora.prepare.options import parse_options
    from avsr.tools.corpora.prepare.run import REFUSED, prepare

    options = parse_options(arguments.corpus, arguments.overrides)
    report = prepare(arguments.corpus, arguments.root, arguments.out, options)
    for name, count in report.manifests.items():
        print(f"{count:7d}  {name}.jsonl")
    for kind, count in report.refused.items():
        print(f"{count:7d}  refused: {kind}")
    if report.refused:
        print(f"the reasons are in {Path(arguments.out, REFUSED)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="avsr", description="Llama-AVSR without attention sinks")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train a config")
    train.add_argument("config", help="a YAML file or a recipe's name")
    _add(train, _train)
    profile = commands.add_parser("profile", help="measure a few steps of a config: speed, time and memory by part")
    profile.add_argument("config", help="a YAML file or a recipe's name")
    profile.add_argument("--steps", type=int, default=10, help="steps that are measured")
    _add(profile, _profile)
    plan = commands.add_parser("plan", help="estimate a config's memory on every ZeRO stage, and the batches that fit")
    plan.add_argument("config", help="a YAML file or a recipe's name")
    plan.add_argument("--ranks", type=int, default=1, help="devices (default: 1)")
    plan.add_argument("--memory", type=float, metavar="GB", help="of a device (default: this one's)")
    _add(plan, _plan)
    pretrain = commands.add_parser("pretrain", help="teach the small visual encoder a corpus with known times")
    pretrain.add_argument("config", help="a YAML file or a recipe's name")
    _add(pretrain, _pretrain)
    evaluate = commands.add_parser("evaluate", help="decode and score a run's test sets")
    evaluate.add_argument("run", help="the run folder")
    evaluate.add_argument("--checkpoint", default="best", help="best, last, average or step-NNNNNN")
    _add(evaluate, _evaluate)
    transcribe = commands.add_parser("transcribe", help="print one line of text a sound or video file")
    transcribe.add_argument("run", help="the run folder")
    transcribe.add_argument("files", nargs="+", metavar="FILE", help="sound or video files, and key=value overrides")
    transcribe.set_defaults(run_command=_transcribe)
    act = commands.add_parser("act-search", help="find the heads that attention calibration (act.beta) helps")
    act.add_argument("run", help="the run folder")
    act.add_argument("--checkpoint", default="best", help="best, last, average or step-NNNNNN")
    _add(act, _act_search)
    analyze = commands.add_parser("analyze", help="write analysis.json and report.html of runs or language models")
    analyze.add_argument(
        "targets",
        nargs="+",
        metavar="TARGET",
        help="run folders, or language models (hub id, folder, .gguf, package:NAME/path) that read plain text; and "
        "key=value: of a run's config, or of a model model.llm.bos_token=TOKEN, model.llm.eos_token=TOKEN, limit=N",
    )
    analyze.add_argument("--text", metavar="FILE", help="one text a line, for models (default: 100 fixed sentences)")
    analyze.add_argument("--out", help="folder of the report (default: the first run, or runs/analysis/NAME)")
    analyze.set_defaults(run_command=_analyze)
    average = commands.add_parser("average", help="write the mean of a run's newest checkpoints as checkpoints/average")
    average.add_argument("run", help="the run folder, trained with training.keep_last")
    average.add_argument("--last", type=int, default=0, metavar="N", help="the newest N (default: all that are kept)")
    average.set_defaults(run_command=_average)
    importing = commands.add_parser("import", help="make a run of an official Llama-AVSR checkpoint")
    importing.add_argument("checkpoint", help="model_avg_N.pth")
    importing.add_argument("--config", required=True, help="a YAML file or a recipe's name that describes it")
    importing.add_argument("--out", required=True, help="the run folder to make")
    importing.add_argument("--reduction", type=int, metavar="R", help="its --reduction_lora, in place of model.lora")
    importing.add_argument("--alpha", type=float, metavar="A", help="its --alpha: LoRA is scaled by A / R")
    _add(importing, _import)
    doctor = commands.add_parser("doctor", help="print versions, devices, backends and what is missing")
    doctor.set_defaults(run_command=_doctor)
    synth = commands.add_parser("synth", help="make a corpus of synthetic speech")
    synth.add_argument("out", help="the folder to make")
    _add(synth, _synth)
    prepare = commands.add_parser("prepare", help="turn the videos of a corpus into mouth crops, sound and manifests")
    prepare.add_argument("corpus", help="lrs2, lrs3, vox2, muavic or videos (a folder of your own)")
    prepare.add_argument("root", help="the corpus as it was handed out")
    prepare.add_argument("out", help="the folder to make")
    _add(prepare, _prepare)
    return parser


def _add(parser: argparse.ArgumentParser, command: object) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.set_defaults(run_command=command)


if __name__ == "__main__":
    main()
