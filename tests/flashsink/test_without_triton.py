"""Where triton cannot be imported (macOS, Windows, CPU wheels of torch) the other backends and attach work."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.integration

CODE = """
import sys
if {how!r} == "missing":
    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "triton":
                raise ModuleNotFoundError("No module named 'triton'", name="triton")
    sys.meta_path.insert(0, Block())
else:
    sys.modules["triton"] = None
import torch, flashsink
state = flashsink.backends()
assert state["triton"].startswith("triton cannot be imported: ") and state["reference"] == "usable", state
usable = [name for name in ("reference", "cpu") if state[name] == "usable"]
q, k, v = (torch.randn(2, heads, 7, 8, requires_grad=True) for heads in (4, 2, 2))
results = []
for name in usable:
    out, stats = flashsink.attention(q, k, v, backend=name, return_stats=True)
    hidden = torch.stack([q.flatten(2), q.flatten(2) * 2])
    loss = flashsink.decorrelation_loss(hidden, torch.tensor([3, 4]), backend=name)
    (out.sum() + loss).backward()
    results.append([out, stats.received, loss, flashsink.activation_stats(hidden, backend=name).max_abs])
torch.testing.assert_close(results[0], results[-1], rtol=1e-4, atol=1e-5)
try:
    flashsink.attention(q, k, v, backend="triton")
    raise AssertionError("triton ran")
except ValueError as error:
    assert "backend: 'triton' cannot be used: triton cannot be imported" in str(error), error
import transformers
sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=60)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2))
ids = torch.randint(3, 60, (2, 9))
want = model(input_ids=ids).logits
probe = flashsink.attach(model)
torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=1e-4, atol=1e-5)
compiled = torch.compile(model, backend="eager")
torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, want, rtol=1e-4, atol=1e-5)
(want.sum() + probe.decorrelation_loss).backward()
assert len(probe.sinks) == 2 and not any(name.split(".")[0] == "triton" for name in sys.modules if sys.modules[name])
print("fine")
"""


@pytest.mark.parametrize(("how", "interpret"), [("missing", "1"), ("none", "0")])
def test_the_other_backends_work(how, interpret):
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    code = CODE.format(how=how)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0 and done.stdout.strip() == "fine", done.stderr[-3000:]
