import sys; sys.path.insert(0, "/tmp/wt/glowrest/tests/common")
import pytest, several_processes, torch
def test_it(tmp_path):
    alone = several_processes.curve("glow, conditional")
    found = several_processes.saved(2, ["glf", "glow, conditional"], tmp_path)["glow, conditional"]
    assert len(found["losses"]) == len(alone["losses"]) >= 4
    for a, b in zip(found["losses"], alone["losses"]): assert a == pytest.approx(b, rel=1e-6, abs=1e-9)
    torch.testing.assert_close(found["weights"], dict(alone["weights"]), rtol=1e-5, atol=1e-6)
