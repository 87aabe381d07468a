"""``Probe.report`` and ``Probe.plot``: the tokens that stand out, against the statistics themselves."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from decoders import LAYERS, build, ids, padded

import flashsink
from flashsink.__main__ import BOS, DELIMITER, FEATURE, toy_model

pytestmark = pytest.mark.integration

ROWS, TOKENS, PLACE = 2, 40, 12


@pytest.fixture(scope="module")
def planted():
    """A probe of a model with sinks at BOS and ``PLACE``, after a forward without padding."""
    torch.manual_seed(0)
    model = toy_model()
    batch = torch.randint(2, 64, (ROWS, TOKENS))
    batch[:, 0], batch[:, PLACE] = BOS, DELIMITER
    probe = flashsink.attach(model, median=True, cosines=True)
    with torch.no_grad():
        model(input_ids=batch)
    return probe


def test_a_planted_sink_is_reported_in_every_layer_and_row(planted):
    found = planted.report()
    places = [(entry["layer"], entry["row"], entry["token"]) for entry in found]
    assert places == sorted(set(places))
    for layer in range(4):
        for row in range(ROWS):
            assert {(layer, row, 0), (layer, row, PLACE)} <= set(places)
    for entry in found:
        layer, row, token = entry["layer"], entry["row"], entry["token"]
        assert entry["kind"] == ("BOS" if token == 0 else "token")
        stats, activations = planted.sinks[layer], planted.activations
        heads = stats.received[row, :, token].double() / (TOKENS - token)
        assert entry["mean_received"] == pytest.approx(float(heads.mean()), rel=1e-5)
        assert entry["sink_rate"] == pytest.approx(float((heads > 0.3).double().mean()) * (token <= TOKENS - 8))
        assert entry["max_abs"] == float(activations.max_abs[layer, row, token])
        assert entry["feature"] == int(activations.feature[layer, row, token])
        assert entry["ratio"] == pytest.approx(entry["max_abs"] / float(activations.median[layer, row]))
        assert entry["cos2"] == (float(planted.cosines[layer, row, token]) if layer < 3 else None)
        assert entry["feature"] == FEATURE or token not in (0, PLACE)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_every_sink_and_the_largest_activations_are_reported(planted):
    loose, places = planted.report(eps=1e-3, min_queries=2), set()
    for layer, stats in enumerate(planted.sinks):
        rate = stats.sink_rate(1e-3, 2)
        places |= {(layer, row, token) for row, token in rate.nonzero().tolist()}
        for row in range(ROWS):
            sizes = planted.activations.max_abs[layer, row]
            places |= {(layer, row, 0), (layer, row, 1 + int(sizes[1:].argmax())), (layer, row, int(sizes.argmax()))}
    assert {(entry["layer"], entry["row"], entry["token"]) for entry in loose} == places
    assert len(loose) > len(planted.report())


def test_padding_and_packed_rows_have_their_own_bos():
    model = build("llama")
    probe = flashsink.attach(model)
    batch, mask = padded(ids(2, 20), torch.tensor([0, 6]), torch.tensor([20, 11]))
    with torch.no_grad():
        model(input_ids=batch, attention_mask=mask)
    found = probe.report(eps=0.01, min_queries=1)
    bos = [(entry["layer"], entry["row"], entry["token"]) for entry in found if entry["kind"] == "BOS"]
    assert bos == [(layer, row, token) for layer in range(LAYERS) for row, token in ((0, 0), (1, 6))]
    assert all(6 <= entry["token"] < 17 for entry in found if entry["row"] == 1)
    positions = torch.cat([torch.arange(9), torch.arange(11)])[None]
    with torch.no_grad():
        model(input_ids=batch[:1], position_ids=positions, use_cache=False)
    found = probe.report()
    assert [entry["token"] for entry in found if entry["kind"] == "BOS"] == [0, 9] * LAYERS
    assert all(entry["row"] == 0 for entry in found)
    sizes = probe.activations.max_abs[1, 0]
    others = {1 + int(sizes[1:9].argmax()), 10 + int(sizes[10:].argmax())}
    assert others <= {entry["token"] for entry in found if entry["layer"] == 1}


def test_what_is_not_recorded_is_none():
    model = build("llama")
    probe = flashsink.attach(model, activations=False)
    model(input_ids=ids(2, 12))
    for entry in probe.report():
        assert entry["max_abs"] is entry["feature"] is entry["ratio"] is None
        assert entry["sink_rate"] is not None and entry["cos2"] is None
    probe.detach()
    probe = flashsink.attach(model, attention=False, stats_every=2)
    model(input_ids=ids(2, 12))
    assert all(entry["sink_rate"] is None and entry["max_abs"] > 0 for entry in probe.report())
    assert all(entry["ratio"] is None for entry in probe.report())
    model(input_ids=ids(2, 12))
    with pytest.raises(RuntimeError, match="stats_every"):
        probe.report()
    probe.detach()
    probe = flashsink.attach(model, attention=False, activations=False)
    model(input_ids=ids(2, 12))
    for read in (probe.report, probe.plot):
        with pytest.raises(RuntimeError, match="attention=False and activations=False"):
            read()


def test_an_overflow_is_reported_as_none():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[5] = torch.inf
    probe = flashsink.attach(model)
    model(input_ids=ids(1, 12))
    found = probe.report()
    json.dumps(found, allow_nan=False)
    assert {entry["layer"] for entry in found if entry["max_abs"] is None} == {1, 2}
    assert all(entry["feature"] == 5 for entry in found if entry["layer"] == 1)
    probe.plot()


def images(figure):
    return [axis.images[0] for axis in figure.axes if axis.images]


def test_a_picture_shows_received_attention_and_activations(planted, tmp_path):
    pytest.importorskip("matplotlib")
    figure = planted.plot(tmp_path / "a.png", row=1)
    received, sizes = (torch.from_numpy(image.get_array().filled(-1)) for image in images(figure))
    want = torch.stack([stats.mean_received[1].mean(dim=0) for stats in planted.sinks])
    torch.testing.assert_close(received[:, : TOKENS - 7], want[:, : TOKENS - 7])
    assert (received[:, TOKENS - 7 :] == -1).all()  # seen by too few
    torch.testing.assert_close(sizes, planted.activations.max_abs[:, 1])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    planted.plot(str(tmp_path / "a.svg"))
    assert "<svg" in (tmp_path / "a.svg").read_text()[:1000]


def test_a_long_row_keeps_its_sinks_in_the_picture():
    pytest.importorskip("matplotlib")
    model = build("llama", max_position_embeddings=2048)
    probe = flashsink.attach(model, attention=False)
    batch = ids(1, 1500)
    with torch.no_grad():
        model.get_input_embeddings().weight[[1, 2], 7] = torch.tensor([2e4, 1e4])
        batch[0, [0, 777]] = torch.tensor([1, 2])
        model(input_ids=batch)
    (image,) = images(probe.plot())
    cells = torch.from_numpy(image.get_array().filled(-1))
    assert cells.shape == (LAYERS, 256) and float(cells.max()) == float(probe.activations.max_abs.max())
    assert cells[0].topk(2).indices.tolist() == [0, 777 * 256 // 1500]
    assert [entry["token"] for entry in probe.report()] == [0, 777] * LAYERS
    assert image.get_extent() == [-0.5, 1499.5, LAYERS - 0.5, -0.5]


def test_bad_pictures(planted, tmp_path, monkeypatch):
    for path in (tmp_path / "a.txt", "report"):
        with pytest.raises(ValueError, match="path: expected a file that ends in .png or .svg"):
            planted.plot(path)
    with pytest.raises(ValueError, match="row: expected 0 to 1, got 2"):
        planted.plot(row=2)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        planted.plot()
