"""Frame-budget batches and the schedule of ranks and steps."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from avsr.data.batches import BatchSampler, Example, collate, make_batches
from avsr.data.manifest import Utterance
from avsr.errors import UserError


def random_sizes(rng: random.Random, count: int, most: int) -> list[int]:
    return [rng.randint(1, most) for _ in range(count)]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("shuffled", [False, True])
def test_area_count_and_completeness(seed: int, shuffled: bool) -> None:
    rng = random.Random(seed)
    most_frames = rng.choice([5, 60, 400])
    sizes = random_sizes(rng, rng.randint(1, 90), most_frames)
    budget, most = rng.randint(most_frames, 4 * most_frames), rng.choice([1, 3, 64])
    batches = make_batches(sizes, budget, most, random.Random(seed) if shuffled else None)
    for batch in batches:
        assert 1 <= len(batch) <= most
        assert len(batch) * max(sizes[i] for i in batch) <= budget
    assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))


def test_without_rng_the_order_is_that_of_length() -> None:
    sizes = [9, 2, 7, 2, 5]
    assert [i for batch in make_batches(sizes, 10, 2) for i in batch] == [1, 3, 4, 2, 0]


def test_the_order_is_that_of_sizes_jittered_one_by_one() -> None:
    """As in all earlier versions, so that their runs continue with the batches they began with."""
    sizes = random_sizes(random.Random(3), 400, 90)
    batches = make_batches(sizes, 100, 1, random.Random(5))
    draw = random.Random(5)
    order = [i for _, i in sorted((size * draw.uniform(0.95, 1.05), i) for i, size in enumerate(sizes))]
    draw.shuffle(order)
    assert [i for batch in batches for i in batch] == order


def test_padding_stays_small() -> None:
    sizes = random_sizes(random.Random(0), 500, 300)
    batches = make_batches(sizes, 1200, 64, random.Random(1))
    area = sum(len(batch) * max(sizes[i] for i in batch) for batch in batches)
    assert area < 1.2 * sum(sizes)  # in random order about 1.8
    assert len(batches) < 1.25 * sum(sizes) / 1200 + 5


def test_full_batches_are_used() -> None:
    assert make_batches([10] * 6, 30, 64) == [[0, 1, 2], [3, 4, 5]]
    assert make_batches([10] * 6, 1000, 4) == [[0, 1, 2, 3], [4, 5]]
    assert make_batches([10], 10, 1) == [[0]]
    assert make_batches([], 10, 1) == []


def test_one_item_larger_than_the_budget_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        make_batches([5, 101, 7], 100, 8)
    assert "101" in str(caught.value) and "training.frames = 100" in str(caught.value)


def schedule(sizes: list[int], **changes: int) -> BatchSampler:
    options = {"max_frames": 200, "max_utterances": 8, "seed": 3, "world": 1, "accumulation": 1, **changes}
    return BatchSampler(np.array(sizes), **options)


SIZES = random_sizes(random.Random(5), 120, 80)


def test_the_same_seed_and_epoch_give_the_same_batches() -> None:
    one, two = schedule(SIZES), schedule(list(SIZES))
    assert list(one.epoch_steps(4, 0)) == list(two.epoch_steps(4, 0))


def test_epochs_and_seeds_differ_in_order_and_in_company() -> None:
    plan = schedule(SIZES)
    epochs = [list(plan.epoch_steps(epoch, 0)) for epoch in range(4)]
    assert len({str(epoch) for epoch in epochs}) == 4
    companies = [{frozenset(micro) for step in epoch for micro in step} for epoch in epochs]
    assert companies[0] != companies[1]
    assert list(schedule(SIZES, seed=4).epoch_steps(0, 0)) != epochs[0]


def test_batches_do_not_come_in_order_of_length() -> None:
    lengths = [max(SIZES[i] for i in step[0]) for step in schedule(SIZES).epoch_steps(0, 0)]
    assert lengths != sorted(lengths) and lengths != sorted(lengths, reverse=True)


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 3), (2, 2), (3, 2)])
def test_ranks_share_an_epoch_without_overlap(world: int, accumulation: int) -> None:
    plan = schedule(SIZES, world=world, accumulation=accumulation)
    whole = [micro for step in schedule(SIZES).epoch_steps(2, 0) for micro in step]
    ranks = [plan.epoch_steps(2, rank) for rank in range(world)]
    counts = {len(steps) for steps in ranks}
    assert counts == {len(whole) // (world * accumulation)}
    taken = []
    for steps in ranks:
        assert all(len(step) == accumulation for step in steps)
        taken += [tuple(micro) for step in steps for micro in step]
    assert len(taken) == len(set(taken))
    assert set(taken) <= {tuple(micro) for micro in whole}
    assert len(whole) - len(taken) < world * accumulation  # only the remainder is left out
    used = [i for micro in taken for i in micro]
    assert len(used) == len(set(used))


def test_too_few_batches_for_a_step_say_what_to_lower() -> None:
    plan = schedule([10, 10, 10], world=2, accumulation=4)
    with pytest.raises(UserError) as caught:
        plan.epoch_steps(0, 0)
    message = str(caught.value)
    for part in ("3 utterances", "1 batches", "2 ranks", "training.accumulation = 4", "8", "training.frames"):
        assert part in message


def test_collate_pads_on_the_right_and_counts() -> None:
    def example(name: str, frames: int, text: list[int]) -> Example:
        utterance = Utterance(id=name, audio=Path(name), text=name, duration=frames / 50)
        return Example(utterance, {"audio": torch.full((frames, 3), float(frames))}, text)

    batch = collate([example("a", 2, [4]), example("b", 5, [5, 6, 7])])
    audio = batch.features["audio"]
    assert audio.shape == (2, 5, 3)
    assert audio[0, :2].eq(2).all() and audio[0, 2:].eq(0).all() and audio[1].eq(5).all()
    assert batch.lengths["audio"].tolist() == [2, 5]
    assert [u.id for u in batch.utterances] == ["a", "b"] and batch.text == [[4], [5, 6, 7]]
    assert batch.seconds == pytest.approx(7 / 50)
    assert batch.label_tokens == 6  # one end token each
