"""Imports go strictly downward, and the source tree can be the working directory."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"flashsink": ROOT / "kernels" / "flashsink", "avsr": ROOT / "avsr"}

# From the bottom up: a module may import only modules of earlier lines, (modules of one line do not know each other).
ORDER = [
    "flashsink.types flashsink.versions flashsink.gpu",
    "flashsink._checks flashsink.reference flashsink.gpu.launch flashsink.gpu.device",
    "flashsink.native flashsink.native_packed flashsink.gpu.tiles flashsink.gpu.decorrelation",
    "flashsink.native_norm flashsink.native_short flashsink.gpu.activations",
    "flashsink.native_received",
    "flashsink.native_attention",
    "flashsink.gpu.attention_forward flashsink.gpu.attention_backward flashsink.gpu.calibrate flashsink.gpu.norm",
    "flashsink.cpu flashsink.gpu.received",
    "flashsink.gpu.attention",
    "flashsink.gpu.backend",
    "flashsink.sdpa",
    "flashsink.backends",
    "flashsink.functional flashsink.hf_masks flashsink.hf_models",
    "flashsink.hf_attention flashsink.records",
    "flashsink.probe",
    "flashsink",
    "avsr.machine",
    "avsr avsr.errors avsr.data avsr.models avsr.synth avsr.training avsr.evaluation avsr.analysis",
    "avsr.corpora avsr.prepare avsr.folders",
    "avsr.composing avsr.progress avsr.limits avsr.locks",
    "avsr.config",
    "avsr.data.audio avsr.data.manifest avsr.data.video_writer",
    "avsr.data.video avsr.models.sources avsr.models.compression avsr.models.torch_file",
    "avsr.data.clip avsr.models.projector avsr.models.label_loss avsr.models.encoder_lora avsr.models.resnet",
    "avsr.data.noise",
    "avsr.data.transforms avsr.models.ctranslate2 avsr.models.llm avsr.data.batches avsr.models.encoder",
    "avsr.models.avhubert_inputs avsr.models.avhubert_network",
    "avsr.models.fairseq_file",
    "avsr.models.whisper avsr.models.wavlm avsr.models.avhubert avsr.models.visual",
    "avsr.models.encoders avsr.data.features",
    "avsr.data.dataset avsr.models.outlines",
    "avsr.models.speech_llm",
    "avsr.losses avsr.build avsr.models.official",
    "avsr.training.jit",
    "avsr.evaluation.act avsr.evaluation.decode avsr.evaluation.wer avsr.training.metrics avsr.training.engine",
    "avsr.training.optimizer_state avsr.training.term_gradients avsr.training.watchdog avsr.training.plan",
    "avsr.training.flops",
    "avsr.evaluation.breakdown avsr.training.checkpoint avsr.training.memory avsr.training.stages avsr.training.trace",
    "avsr.training.options avsr.training.faults avsr.training.resume avsr.average avsr.importing",
    "avsr.training.trainer",
    "avsr.analysis.plots avsr.analysis.subject avsr.analysis.groups",
    "avsr.analysis.figures avsr.analysis.mechanism avsr.analysis.observe",
    "avsr.analysis.collect avsr.analysis.example",
    "avsr.analysis.tokens",
    "avsr.analysis.origin avsr.analysis.features",
    "avsr.analysis.causal avsr.analysis.sections",
    "avsr.analysis.report",
    "avsr.corpora.source avsr.corpora.transcripts avsr.prepare.faces avsr.prepare.inert avsr.prepare.pool",
    "avsr.corpora.lrs avsr.corpora.muavic avsr.corpora.voxceleb avsr.prepare.landmarks",
    "avsr.corpora.videos avsr.prepare.options avsr.prepare.crop",
    "avsr.prepare.clips",
    "avsr.prepare.journal",
    "avsr.prepare.run avsr.prepare.single",
    "avsr.evaluate",
    "avsr.act_search",
    "avsr.synth.words avsr.synth.voices avsr.synth.espeak avsr.synth.pool",
    "avsr.synth.visemes",
    "avsr.synth.sentences avsr.synth.mouth",
    "avsr.analysis.inputs avsr.doctor",
    "avsr.analyze",
    "avsr.synth.options",
    "avsr.synth.shards",
    "avsr.synth.corpus",
    "avsr.training.augment avsr.training.timed avsr.training.warm_start",
    "avsr.train avsr.pretrain",
    "avsr.planning",
    "avsr.profiling",
    "avsr.cli",
    "avsr.demo",
    "avsr.demo_av",
]
LEVEL = {name: level for level, line in enumerate(ORDER) for name in line.split()}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in SOURCES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def imported(path: Path) -> set[str]:
    known = modules().keys()
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in known else node.module)
    return names & known


def test_every_module_has_its_place() -> None:
    assert modules().keys() == LEVEL.keys()


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_downward(name: str) -> None:
    for other in imported(modules()[name]):
        assert LEVEL[other] < LEVEL[name], f"{name} imports {other}"
        assert not (name.startswith("flashsink") and other.startswith("avsr"))


def test_files_stay_small() -> None:
    for name, path in modules().items():
        limit = 500 if name.startswith("flashsink") else 400
        assert len(path.read_text(encoding="utf-8").splitlines()) <= limit, path


@pytest.mark.parametrize("with_kernels", [False, True])
def test_transformers_imports_from_the_repository_root(with_kernels: bool, tmp_path: Path) -> None:
    """The folder ``kernels`` must not be taken for Hugging Face's package of that name."""
    search = [str(ROOT)]
    if with_kernels:
        package = tmp_path / "kernels"
        package.mkdir()
        (package / "__init__.py").write_text(
            "__version__ = '99.0.0'\n"
            "def __getattr__(name):\n    return type(name, (), {'__init__': lambda self, *a, **k: None})\n"
        )
        info = tmp_path / "kernels-99.0.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 99.0.0\n")
        search.insert(0, str(tmp_path))
    code = (
        f"import sys; sys.path[:0] = {search!r}\n"
        "import transformers\nfrom transformers import LlamaForCausalLM\nimport flashsink, avsr\nprint('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("fine"), done.stderr
