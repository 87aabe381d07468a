"""Rounds, ratios and verdicts, with steps whose times and memory are known."""

from __future__ import annotations

import time

import pytest
import torch

from bench.runner.measure import Absent, Bench, Comparison, Provider, Runner, Sample, report, rounds_cpu
from bench.runner.memory import peak_memory

CPU = torch.device("cpu")


@pytest.fixture
def rows():
    return []


@pytest.fixture
def bench(rows):
    return Bench(CPU, 0.01, rows.append)


def comparison(*providers, **options):
    return Comparison("claim", "S1", torch.float32, providers, **options)


def step(name, ours=False):
    return Provider(name, lambda: lambda: None, ours)


def test_a_ratio_is_that_of_paired_samples(bench, rows):
    samples = {"peer": Sample([1.0, 2.0, 4.0], 100.0), "flashsink": Sample([2.0, 6.0, 16.0], 50.0)}
    report(bench, comparison(step("peer"), step("flashsink", True), target="<= 2", memory="<= 0.5"), samples)
    peer, ours, memory = rows
    assert (ours["ratio"], ours["against"], ours["target"], ours["verdict"]) == ("3", "peer", "<= 2", "missed")
    assert (ours["p50_ms"], ours["ratio_p20"], ours["ratio_p80"]) == ("6000.0000", "2.4", "3.6")
    assert (peer["ratio"], peer["target"], peer["verdict"]) == ("3", "", "report")
    assert (memory["metric"], memory["ratio"], memory["verdict"]) == ("memory", "0.5", "met")


def test_the_peer_can_be_the_numerator_and_a_factor_applies(bench, rows):
    samples = {"peer": Sample([1.0]), "flashsink": Sample([2.0])}
    given = comparison(step("peer"), step("flashsink", True), upper="peer", factor=1.5, target=">= 0.75")
    report(bench, given, samples)
    assert [row["ratio"] for row in rows] == ["0.75", "0.75"]
    assert rows[1]["verdict"] == "met"


def test_small_steps_that_wait_for_the_host_say_so(bench, rows):
    samples = {
        "peer": Sample([1e-3], host=[0.5e-3]),
        "flashsink": Sample([1e-3], host=[0.99e-3]),
        "long": Sample([1.0], host=[1.0]),
    }
    providers = step("peer"), step("long"), step("flashsink", True)
    report(bench, comparison(*providers, note="forward only"), samples)
    assert [row["note"] for row in rows] == ["forward only", "forward only", "forward only; host-bound"]
    rows.clear()
    report(bench, comparison(*providers, graph=True), samples)
    assert [row["note"] for row in rows] == [""] * 3


def test_our_best_is_compared_with_the_best_peer(bench, rows):
    times = {"slow peer": 4.0, "peer": 2.0, "slow": 6.0, "fast": 1.0}
    providers = [step(name, name in ("slow", "fast")) for name in times]
    report(bench, comparison(*providers, target="<= 1"), {name: Sample([t]) for name, t in times.items()})
    found = {row["provider"]: row for row in rows}
    assert found["fast"]["ratio"] == "0.5" and found["fast"]["verdict"] == "met"
    assert found["slow"]["ratio"] == "3" and found["slow"]["verdict"] == "report"
    assert found["slow peer"]["ratio"] == "0.25" and found["slow peer"]["against"] == "fast"


def test_what_fails_or_is_absent_is_a_row_and_the_rest_continues(bench, rows):
    def fails():
        raise RuntimeError("no such\nthing")

    def absent():
        raise Absent("not installed")

    measured = []
    providers = Provider("a", fails), Provider("b", lambda: absent), step("peer"), step("flashsink", True)
    bench.compare(comparison(*providers, after=measured.append))
    assert list(measured[0]) == ["peer", "flashsink"]
    verdicts = {row["provider"]: row["verdict"] for row in rows}
    assert verdicts["a"] == "error: RuntimeError: no such thing"
    assert verdicts["b"] == "absent: not installed"
    assert verdicts["flashsink"] == verdicts["peer"] == "report"


def test_without_a_peer_there_is_no_verdict(bench, rows):
    bench.compare(comparison(step("flashsink", True), target="<= 1"))
    assert [row["verdict"] for row in rows] == ["nothing to compare with"]


def test_after_the_deadline_nothing_is_made(bench, rows):
    bench.deadline = time.monotonic() - 1
    made = []
    bench.compare(comparison(Provider("a", lambda: made.append(1), True)))
    assert not made and rows[0]["verdict"] == "no time left"


def test_rounds_take_turns_and_leave_the_preparation_out():
    order = []

    def slow():
        time.sleep(0.02)

    runners = {"a": Runner(slow, lambda: order.append("a")), "b": Runner(None, lambda: order.append("b"))}
    runners["b"].seconds = 1.0
    samples = {name: Sample() for name in runners}
    rounds_cpu(runners, samples, 0.0, 4, False, float("inf"))
    assert order == list("abbaabba")
    assert max(samples["a"].times) < 0.02
    assert len(samples["a"].times) == len(samples["b"].times) == 4


def test_peak_memory_counts_what_is_alive_at_once():
    def one_after_another():
        for _ in range(4):
            torch.zeros(2**20, dtype=torch.uint8)

    def together():
        return [torch.zeros(2**20, dtype=torch.uint8) for _ in range(4)]

    assert 2**20 <= peak_memory(one_after_another, CPU) < 2 * 2**20
    assert 4 * 2**20 <= peak_memory(together, CPU) < 5 * 2**20
