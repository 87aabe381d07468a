"""Saved configs: reading them back and comparing them."""

from __future__ import annotations

from pathlib import Path

import pytest

from avsr.config import ModelConfig, read_run_config
from avsr.config.composing import differences
from avsr.errors import UserError


def test_a_run_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run.*config.yaml"):
        read_run_config(tmp_path)


def test_differences_name_every_leaf() -> None:
    ours, theirs = ModelConfig(), ModelConfig()
    theirs.lora.rank = 3
    theirs.prompts.audio = "other"
    assert differences(ours, theirs, "model.") == [
        f"model.prompts.audio: {ours.prompts.audio!r} != 'other'",
        f"model.lora.rank: {ours.lora.rank} != 3",
    ]
