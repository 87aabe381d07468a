"""Every code block of the pages runs, or where it needs a hub, a GPU or a cluster is parsed and its config composed."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from avsr import cli
from avsr.config import load_config
from avsr.config.composing import compose
from avsr.tools.corpora.prepare.options import parse_options as prepare_options
from avsr.tools.corpora.prepare.options import read_folders
from avsr.tools.corpora.synth.corpus import parse_options as synth_options
from avsr.tools.lipreader.pretrain import PretrainConfig

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "avsr/README.md", "kernels/README.md", "bench/README.md", "configs/README.md")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)(?:#([^)]*))?\)")
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M"


class Block(NamedTuple):
    page: str
    language: str
    text: str


def blocks(language: str) -> list[Block]:
    return [Block(page, kind, text) for page in PAGES for kind, text in _fences(page) if kind == language]


def _fences(page: str) -> list[tuple[str, str]]:
    return FENCE.findall((ROOT / page).read_text(encoding="utf-8"))


def test_every_block_has_a_language_that_is_tested() -> None:
    assert {
        (page, kind) for page in PAGES for kind, _ in _fences(page) if kind not in ("sh", "python", "json", "yaml")
    } == set()
    assert blocks("sh") and blocks("python")


@pytest.mark.parametrize("page", [page for page in PAGES if any(kind == "python" for kind, _ in _fences(page))])
def test_python_blocks_run_from_top_to_bottom(page: str, tiny_llm: Path) -> None:
    names: dict[str, object] = {}
    for kind, text in _fences(page):
        if kind == "python":
            exec(compile(text.replace(HUB_MODEL, str(tiny_llm)), page, "exec"), names)


def test_json_blocks_are_manifest_rows(tmp_path: Path) -> None:
    for block in blocks("json"):
        for line in block.text.splitlines():
            assert {"id", "audio", "text"} <= json.loads(line).keys()


@pytest.mark.parametrize("block", blocks("sh"), ids=lambda block: block.page)
def test_shell_blocks_name_commands_that_exist(block: Block) -> None:
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        if words:
            _check(words)


def _check(words: list[str]) -> None:
    command, *rest = words
    match Path(command).name:
        case "avsr":
            _check_avsr(rest)
        case "make":
            targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
            assert {word for word in rest if "=" not in word} <= targets
        case "python" | "python3":
            assert rest[0] == "-m" and importlib.util.find_spec(rest[1]) is not None, words
        case "deepspeed":
            name, given, *overrides = rest[rest.index("--module") + 1 :]
            assert name in ("avsr.train", "avsr.evaluate")
            load_config(given if name == "avsr.train" else "demo", overrides)
        case "sbatch":
            script, *given = [word for word in rest if not word.startswith("--")]
            assert (ROOT / script).is_file()
            if Path(script).stem == "train":
                load_config(given[0], given[1:])
            else:
                _check_avsr(given)
        case "nsys" | "ncu":
            if ".venv/bin/avsr" in rest:
                _check_avsr(rest[rest.index(".venv/bin/avsr") + 1 :])
        case other:
            assert other in ("pip", "cd", "git"), words


def _check_avsr(words: list[str]) -> None:
    """The command parses, its config exists, and its keys are known."""
    arguments, rest = cli._parser().parse_known_args(words)
    overrides = [*getattr(arguments, "overrides", []), *rest]
    match words[0]:
        case "analyze":
            targets = [word for word in arguments.targets if "=" not in word]
            assert targets and all(
                word.startswith(("limit=", "model.llm.")) for word in arguments.targets if "=" in word
            )
        case "prepare":
            prepare_options(arguments.corpus, read_folders(arguments.corpus, [*arguments.targets, *rest])[1])
        case "synth":
            synth_options(overrides)
        case "pretrain":
            compose(arguments.config, overrides, PretrainConfig)
        case _:
            load_config(getattr(arguments, "config", "demo"), overrides)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
        for target, anchor in LINK.findall(text):
            if target.startswith("http"):
                continue
            path = (ROOT / page).parent / target
            assert path.exists(), f"{page}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
