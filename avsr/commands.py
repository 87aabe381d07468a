"""What the commands of the console script ``avsr`` do; imports wait until one is run, so that ``--help`` is fast."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from avsr.errors import EXIT_USER, UserError, visible
from avsr.runtime.share import Share


def _split(given: list[str]) -> tuple[list[str], list[str]]:
    """Names and ``key=value`` overrides; what exists is a name even with a "="."""
    names: list[str] = []
    overrides: list[str] = []
    for text in given:
        (names if "=" not in text or Path(text).exists() else overrides).append(text)
    return names, overrides


def run_train(arguments: argparse.Namespace) -> None:
    from avsr.config import load_config
    from avsr.training.run import train_and_leave

    print(train_and_leave(load_config(arguments.config, arguments.overrides)))


def run_profile(arguments: argparse.Namespace) -> None:
    from avsr.config import load_config
    from avsr.tools.estimate.profiling import profile_and_leave

    profile_and_leave(load_config(arguments.config, arguments.overrides), arguments.steps)


def run_plan(arguments: argparse.Namespace) -> None:
    from avsr.config import load_config
    from avsr.tools.estimate.planning import page, plan
    from avsr.training.memory import device_memory

    config = load_config(arguments.config, arguments.overrides)
    room = device_memory() if arguments.memory is None else arguments.memory * 1e9
    print(page(config, plan(config, arguments.ranks, room), room))


def run_pretrain(arguments: argparse.Namespace) -> None:
    from avsr.config.composing import compose
    from avsr.tools.lipreader.pretrain import PretrainConfig, pretrain

    print(pretrain(compose(arguments.config, arguments.overrides, PretrainConfig)))


def run_evaluate(arguments: argparse.Namespace) -> None:
    from avsr.evaluation.run import evaluate, score_lines

    scores = evaluate(arguments.run, arguments.overrides, arguments.checkpoint, arguments.out)
    print("\n".join(score_lines(scores)))


def run_transcribe(arguments: argparse.Namespace) -> None:
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


def run_act_search(arguments: argparse.Namespace) -> None:
    from avsr.evaluation.act_search import act_search

    print(act_search(arguments.run, arguments.overrides, arguments.checkpoint))


def run_analyze(arguments: argparse.Namespace) -> None:
    from avsr.tools.analysis.composite import AUDIO, IMAGE, Media
    from avsr.tools.analyze import analyze
    from avsr.tools.analyze_encoder import analyze_encoders

    targets, overrides = _split(arguments.targets)
    if not targets:
        raise UserError("analyze: no run or model given")
    given = [(kind, file) for kind in (AUDIO, IMAGE) if (file := getattr(arguments, kind)) is not None]
    if arguments.encoder:
        others = [f"--{kind}" for kind, _ in given] + ["--text"] * (arguments.text is not None)
        if others:
            raise UserError(f"analyze: --encoder reads the clips of --manifest, not {others[0]}")
        print(analyze_encoders(targets, overrides, arguments.manifest, arguments.out))
        return
    if arguments.manifest is not None:
        raise UserError("analyze: --manifest is for speech encoders, with --encoder")
    if len(given) > 1:
        raise UserError("analyze: expected --audio or --image, got both")
    print(analyze(targets, overrides, arguments.out, arguments.text, Media(*given[0]) if given else None))


def run_import(arguments: argparse.Namespace) -> None:
    from avsr.tools.importing import import_checkpoint

    given = arguments.checkpoint, arguments.config, arguments.out, arguments.overrides
    print(import_checkpoint(*given, reduction=arguments.reduction, alpha=arguments.alpha))


def run_average(arguments: argparse.Namespace) -> None:
    from avsr.tools.average import average

    print(average(arguments.run, arguments.last))


def run_doctor(arguments: argparse.Namespace) -> None:
    from avsr.tools.doctor import report

    lines, complete = report()
    print("\n".join(lines))
    if not complete:
        raise SystemExit(1)


def run_synth(arguments: argparse.Namespace) -> None:
    from avsr.tools.corpora.synth.corpus import parse_options, synthesise

    share = _share(arguments)
    options = parse_options(arguments.overrides)
    for name, count in synthesise(Path(arguments.out), options, share, merge=arguments.merge).items():
        print(f"{count:7d}  {name}")
    _print_share(share)


def run_prepare(arguments: argparse.Namespace) -> None:
    from avsr.tools.corpora.prepare.options import DEBIAN, parse_options, read_folders
    from avsr.tools.corpora.prepare.run import REFUSED, prepare

    share = _share(arguments)
    (*root, out), overrides = read_folders(arguments.corpus, arguments.targets)
    options = parse_options(arguments.corpus, overrides)
    if arguments.corpus == DEBIAN:
        from avsr.tools.corpora.debian.corpus import prepare_debian

        if share is not None or arguments.merge:
            given = "--merge" if share is None else "--shard"
            raise UserError(f"{given} is none of {DEBIAN}: one process makes it in a minute")
        manifests, refused = prepare_debian(out, options.debs)
    else:
        report = prepare(arguments.corpus, root[0], out, options, share, merge=arguments.merge)
        manifests, refused = report.manifests, report.refused
    for name, count in manifests.items():
        print(f"{count:7d}  {name}.jsonl")
    for kind, count in refused.items():
        print(f"{count:7d}  refused: {kind}")
    _print_share(share)
    if refused and share is None:
        print(f"the reasons are in {Path(out, REFUSED)}")


def run_index(arguments: argparse.Namespace) -> None:
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


def run_pack(arguments: argparse.Namespace) -> None:
    from avsr.tools.pack import pack

    options = {"size": arguments.size, "clips": arguments.clips, "absolute": arguments.allow_absolute}
    share = _share(arguments)
    packed = pack(arguments.manifest, arguments.out, **options, share=share, merge=arguments.merge)
    if share is None:
        print(f"{packed.lines:7d}  {Path(arguments.manifest).stem}.jsonl")
    print(f"{packed.shards:7d}  shards, {packed.written} of them written now")
    _print_share(share)
