"""The model of step time and memory: sizes against real models, communication against a simulated ring."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from avsr.config import LoraConfig
from avsr.models.projector import make_projector
from avsr.tools.estimate.flops import step_flops
from avsr.tools.estimate.memory import Way, read_sizes
from bench.scale import __main__, check, page
from bench.scale.model import (
    FEATURES,
    PROJECTOR,
    RANKS,
    Cluster,
    Link,
    all_gather,
    batches,
    communication,
    llama,
    needed,
    rows,
    step,
)
from bench.workloads.shapes import MODELS

NODE = Cluster("node", 4e14, 80e9, 8, Link(3e11, 5e-6), Link(4e10, 1e-5), fixed=0.03)


@pytest.mark.parametrize("name", RANKS)
def test_the_sizes_are_those_of_the_real_models(name: str) -> None:
    m = MODELS[name]
    with torch.device("meta"):
        config = LlamaConfig(
            hidden_size=m.hidden,
            intermediate_size=m.intermediate,
            num_hidden_layers=m.layers,
            num_attention_heads=m.heads,
            num_key_value_heads=m.kv_heads,
            head_dim=m.dim,
            vocab_size=m.vocabulary,
            tie_word_embeddings="3.2" in name,
        )
        model = LlamaForCausalLM(config).requires_grad_(False)
        lora = PeftConfig(r=RANKS[name], target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        projector = make_projector(FEATURES, PROJECTOR, m.hidden, True, 1.0)
    count = sum(p.numel() for p in projector.parameters())
    assert llama(name) == read_sizes(config, get_peft_model(model, lora), LoraConfig(rank=RANKS[name]), count, 0)


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(1, 64))
def test_gathering_inside_a_node_is_a_ring(ranks: int, blocks: int) -> None:
    """Every rank hands on what it got last, ranks - 1 times."""
    size, link = blocks * 1e6, NODE.inside
    held = [{rank} for rank in range(ranks)]
    seconds = 0.0
    while any(len(have) < ranks for have in held):
        last = [max(have, key=lambda block, rank=rank: (rank - block) % ranks) for rank, have in enumerate(held)]
        for rank in range(ranks):
            held[rank].add(last[rank - 1])
        seconds += size / ranks / link.rate + link.delay
    assert all_gather(size, ranks, NODE) == pytest.approx(seconds)


def test_what_is_communicated_grows_as_it_must() -> None:
    sizes = llama("llama-3.2-3b")
    assert communication(sizes, Way(1, 3), NODE) == (0.0, 0.0)
    two, three = Way(8, 2), Way(8, 3)
    end, spread = communication(sizes, two, NODE)
    assert spread == 0 and end == pytest.approx(2 * 7 / 8 * sizes.trained * 2 / 3e11 + 14 * 5e-6)
    plain = communication(sizes, three, NODE)[1]
    assert plain > 2 * 7 / 8 * sizes.frozen * 2 / 3e11
    assert communication(sizes, replace(three, checkpointing="true"), NODE)[1] == pytest.approx(1.5 * plain)
    assert communication(sizes, Way(64, 3), replace(NODE, between=Link(1e9, 1e-5)))[1] > 10 * plain


def test_a_step_is_its_parts_and_one_rank_waits_for_nobody() -> None:
    sizes, way = llama("llama-3.2-1b"), Way(1, 2)
    one = step(sizes, way, NODE, 2048)
    assert one.waiting == one.communication == 0
    drawn = [lengths for ranks in batches(2048, 1) for lengths in ranks]
    assert one.compute == pytest.approx(sum(step_flops(sizes, rows(x)) for x in drawn) / len(drawn) / NODE.flops)
    many = step(sizes, Way(64, 3), NODE, 2048)
    assert many.waiting > 0 and many.seconds == many.compute + many.waiting + many.communication + many.fixed
    hidden = step(sizes, Way(64, 3), replace(NODE, hidden=1e3), 2048)
    assert hidden.communication < many.communication


def test_batches_stay_within_their_tokens() -> None:
    for ranks in batches(1000, 4):
        assert len(ranks) == 4
        assert all(len(lengths) * max(lengths) <= 1000 for lengths in ranks)


def test_stage_3_makes_room() -> None:
    sizes = llama("llama-3.1-8b")
    assert needed(sizes, Way(8, 2), 512) - needed(sizes, Way(8, 3), 512) > 8e9
    assert needed(sizes, Way(64, 3), 4096) < needed(sizes, Way(8, 3), 4096)
    # but for large batches it takes more: DeepSpeed's linear layer keeps inputs of frozen matrices
    assert needed(sizes, Way(8, 3), 16384) > needed(sizes, Way(8, 2), 16384)


@pytest.mark.integration
def test_the_page_holds_what_the_check_measured(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    table = tmp_path / "check.csv"
    monkeypatch.setattr(check, "TABLE", table)
    row = dict.fromkeys(check.FIELDS, "1") | {"measured_s": "2.5", "predicted_s": "2.0", "ranks": "2", "stage": "3"}
    check._append(row | {"measured_s": "9"})
    check._append(row)
    shown = page.check_table(table)
    assert "2.00 / 2.50 (-20%)" in shown and "9" not in shown
    page.draw(tmp_path / "scale.svg")
    assert len((tmp_path / "scale.svg").read_text().splitlines()) < 300


def test_the_committed_page_is_the_models(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    copy = tmp_path / "README.md"
    copy.write_text(page.report.README.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(page.report, "README", copy)
    monkeypatch.setattr(page, "draw", lambda: None)
    monkeypatch.setattr("sys.argv", ["scale"])
    assert __main__.main() == 0
    assert copy.read_text() == (page.ledger.ROOT / "bench" / "README.md").read_text(), "python -m bench.scale"
    monkeypatch.setattr("sys.argv", ["scale", "other"])
    assert __main__.main() == 2


@pytest.mark.slow
def test_gloo_between_two_processes_is_timed() -> None:
    found = check.link(2)
    assert 1e7 < found.rate < 1e12 and 0 < found.delay < 0.1
