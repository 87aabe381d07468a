"""The loss over token masks and other anchors than BOS, pair by pair in float64."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import relative

import flashsink

pytestmark = pytest.mark.integration

NAN = float("nan")
TOKENS, FEATURES = 9, 7
# name: (rows, options of the layout, lengths, mask, positions); x in the mask counts, . does not
LAYOUTS = {
    "right": (2, {}, [6, 4], ["x..xxx...", ".xx......"], [[0, 4], [5, -1]]),
    "left": (2, {"starts": [0, 4]}, [6, 4], ["xx.xxx...", "....x.xx."], [[3, 0], [4, 8]]),
    "packed": (1, {"cu_seqlens": [0, 4, 4, 9]}, [3, 0, 5], ["xxx.x.x.x"], [[1, 4, 7]]),
}
FORMS = ("mask", "positions", "mask and positions", "constants", "mask and constants", "several constants")


class Problem:
    """A layout with a form of the loss: its arguments, and the pairs (row, token, anchor) that count, an anchor being
    (row, position) or the number of a constant."""

    def __init__(self, layout, form, dtype=torch.float32):
        rows, options, lengths, mask, places = LAYOUTS[layout]
        g = torch.Generator().manual_seed(3)
        self.layers = [torch.randn(rows, TOKENS, FEATURES, generator=g).to(dtype) for _ in range(2)]
        self.options = {key: torch.tensor(value) for key, value in options.items()}
        sequences = [(b, *own) for b, row in enumerate(oracle.runs(rows, TOKENS, None, **options)) for own in row]
        self.spans = (
            torch.tensor([[c == "x" for c in row] for row in mask]) if "mask" in form else torch.tensor(lengths)
        )
        self.constants = None
        if "constants" in form:
            self.constants = torch.randn(2, *([3] if "several" in form else []), FEATURES, generator=g)
        self.anchors = torch.tensor(places) if "positions" in form else self.constants
        self.pairs = []
        for n, (b, first, end) in enumerate(sequences):
            if "mask" in form:
                counted = [s for s in range(first, end) if mask[b][s] == "x"]
            else:
                counted = list(range(first + ("constants" in form), first + lengths[n]))
            if "positions" in form:
                anchors = [(b, p) for p in places[b] if first <= p < end]
            elif "constants" in form:
                anchors = range(3 if "several" in form else 1)
            else:
                anchors = [(b, first)]
            self.pairs += [(b, s, a) for s in counted for a in anchors if a != (b, s)]

    def loss(self, layers, margin=0.0):
        total = 0.0
        for index, layer in enumerate(layers):
            layer = layer.double()
            for b, s, anchor in self.pairs:
                h = layer[b, s]
                if isinstance(anchor, tuple):
                    a = layer[anchor]
                else:
                    a = self.constants.double().view(2, -1, FEATURES)[index, anchor]
                cos = (h * a).sum() / (oracle.norm(h) * oracle.norm(a))
                total = total + torch.relu(cos * cos - margin)
        return total / len(layers) / len(self.pairs)

    def unused(self):
        """(B, S) bool: tokens in no pair."""
        used = torch.zeros(self.layers[0].shape[:2], dtype=torch.bool)
        for b, s, anchor in self.pairs:
            used[b, s] = True
            if isinstance(anchor, tuple):
                used[anchor] = True
        return ~used


@pytest.mark.parametrize("backend", [None, "reference", "cpu"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_form_in_every_layout(layout, form, backend):
    """Tokens in no pair hold NaN, and get a gradient of exactly 0."""
    for dtype, margin in ((torch.float32, 0.0), (torch.bfloat16, 0.1)):
        problem = Problem(layout, form, dtype)
        exact = [h.double().requires_grad_() for h in problem.layers]
        want = problem.loss(exact, margin)
        unused = problem.unused()
        leaves = [h.masked_fill(unused[..., None], NAN).requires_grad_() for h in problem.layers]
        loss = flashsink.decorrelation_loss(
            leaves, problem.spans, anchors=problem.anchors, margin=margin, backend=backend, **problem.options
        )
        assert loss.dtype == torch.float32 and loss.shape == ()
        torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
        gradients = torch.autograd.grad(loss, leaves)
        for mine, other in zip(gradients, torch.autograd.grad(want, exact), strict=True):
            assert mine.dtype == dtype and not mine[unused].any()
            assert relative(mine, other) < 2.0 * max(torch.finfo(dtype).eps, 1e-6)


def test_lengths_and_bos_said_otherwise_are_the_same_loss():
    problem = Problem("left", "mask")
    lengths, starts = torch.tensor([6, 4]), torch.tensor([0, 4])
    position = torch.arange(TOKENS)
    mask = (position >= starts[:, None]) & (position < (starts + lengths)[:, None])
    want = flashsink.decorrelation_loss(problem.layers, lengths, starts=starts, margin=0.05)
    for anchors in (None, starts[:, None]):
        loss = flashsink.decorrelation_loss(problem.layers, mask, starts=starts, anchors=anchors, margin=0.05)
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)


def test_several_anchors_are_the_mean_of_each_where_they_count_the_same():
    h = torch.randn(3, 2, TOKENS, FEATURES)
    mask = torch.arange(TOKENS).expand(2, -1) > 4
    anchors = torch.tensor([[0, 3], [4, 1]])
    both = flashsink.decorrelation_loss(h, mask, anchors=anchors)
    each = [flashsink.decorrelation_loss(h, mask, anchors=anchors[:, i : i + 1]) for i in (0, 1)]
    torch.testing.assert_close(both, torch.stack(each).mean())


def test_constants_send_no_gradient_and_do_not_let_bos_move():
    h, anchors = torch.randn(2, 1, 5, FEATURES, requires_grad=True), torch.randn(2, FEATURES, requires_grad=True)
    flashsink.decorrelation_loss(h, torch.tensor([5]), anchors=anchors).backward()
    assert anchors.grad is None and not h.grad[:, 0, 0].any() and h.grad[:, 0, 1:].all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_nothing_counted_gives_exactly_zero(form, margin):
    problem = Problem("right", form)
    h = [x.requires_grad_() for x in problem.layers]
    spans = torch.zeros_like(problem.spans)
    loss = flashsink.decorrelation_loss(h, spans, anchors=problem.anchors, margin=margin)
    assert loss.item() == 0.0 and not any(g.any() for g in torch.autograd.grad(loss, h))
    none = flashsink.decorrelation_loss(h, problem.spans, anchors=torch.full((2, 2), -1))
    assert none.item() == 0.0
    empty = [x[:, :0] for x in h]
    if problem.constants is not None:
        spans = torch.zeros(2, 0, dtype=torch.bool) if "mask" in form else torch.zeros(2, dtype=torch.long)
        assert flashsink.decorrelation_loss(empty, spans, anchors=problem.anchors).item() == 0.0


def test_zero_vectors_count_as_zero_and_nan_stays_in_its_row():
    h = torch.randn(1, 2, TOKENS, FEATURES)
    h[0, 0, 2], h[0, 1, 4, 3] = 0.0, NAN
    mask, anchors = torch.ones(2, TOKENS, dtype=torch.bool), torch.tensor([[2], [0]])
    leaf = h[:, :1].clone().requires_grad_()
    loss = flashsink.decorrelation_loss(leaf, mask[:1], anchors=anchors[:1])
    loss.backward()
    assert loss.item() == 0.0 and leaf.grad.isfinite().all()
    leaf = h.clone().requires_grad_()
    loss = flashsink.decorrelation_loss(leaf, mask, anchors=anchors)
    loss.backward()
    assert loss.isnan() and leaf.grad[0, 0].isfinite().all() and leaf.grad[0, 1, 4].isnan().all()


BAD = [
    ("spans", {"spans": torch.ones(2, 8, dtype=torch.bool)}),
    ("spans", {"spans": torch.ones(9, dtype=torch.bool)}),
    ("spans", {"spans": torch.ones(2, 9, dtype=torch.bool), "starts": torch.tensor([0, 1])}),
    ("spans", {"spans": torch.ones(2, 9)}),
    ("anchors", {"anchors": torch.tensor([0, 1])}),
    ("anchors", {"anchors": torch.tensor([[0], [9]])}),
    ("anchors", {"anchors": torch.tensor([[0], [-2]])}),
    ("anchors", {"anchors": torch.tensor([[0]])}),
    ("anchors", {"anchors": torch.zeros(2, 0, dtype=torch.long)}),
    ("anchors", {"anchors": torch.tensor([[0], [0]]), "starts": torch.tensor([0, 1])}),
    ("anchors", {"anchors": torch.ones(2, 9, dtype=torch.bool)}),
    ("anchors", {"anchors": [[0], [0]]}),
    ("anchors", {"anchors": torch.ones(3, 7)}),
    ("anchors", {"anchors": torch.ones(2, 6)}),
    ("anchors", {"anchors": torch.ones(7)}),
    ("anchors", {"anchors": torch.ones(2, 0, 7)}),
]


@pytest.mark.parametrize(("argument", "options"), BAD)
def test_bad_input_is_refused_by_name(argument, options):
    options = {"spans": torch.tensor([4, 3])} | options
    with pytest.raises(ValueError, match=f"^{argument}: expected .*, got"):
        flashsink.decorrelation_loss(torch.randn(2, 2, 9, 7), **options)


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize("form", ["mask", "positions", "constants"])
def test_backends_without_it_refuse_by_name(monkeypatch, backend, form):
    from flashsink import dispatch

    monkeypatch.setattr(dispatch, "_state", lambda name: "usable")
    monkeypatch.setattr(dispatch.launch, "INTERPRETED", True)
    problem = Problem("right", form)
    with pytest.raises(ValueError, match=f"^backend: '{backend}' cannot be used: its decorrelation loss"):
        flashsink.decorrelation_loss(problem.layers, problem.spans, anchors=problem.anchors, backend=backend)


def test_unchecked_positions_are_none(monkeypatch):
    """As on a GPU, where values are not read."""
    from flashsink import checks

    monkeypatch.setattr(checks, "check_values", lambda *_: False)
    h, spans = torch.randn(1, 2, 9, 7), torch.tensor([4, 3])
    got = flashsink.decorrelation_loss(h, spans, anchors=torch.tensor([[1, 9], [0, -7]]))
    torch.testing.assert_close(got, flashsink.decorrelation_loss(h, spans, anchors=torch.tensor([[1], [0]])))
