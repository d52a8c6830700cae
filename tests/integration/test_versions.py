"""A cluster whose record says that it runs another Ray: every command that would use it says so and does nothing."""

import json

from cluster.state import write_atomic
from tests.integration.conftest import Home


def test_a_cluster_of_another_ray_is_refused_and_still_seen_and_used_again(home: Home) -> None:
    assert home.tpu("start").returncode == 0
    path = home.state / "clusters" / "local" / "cluster.json"
    text = path.read_text()
    record = json.loads(text)
    own = record["bundle"]["versions"]["ray"]
    record["bundle"]["versions"]["ray"] = "9.9.9"
    write_atomic(path, json.dumps(record))
    try:
        for refused in (home.launch("run.name=never", limit=60), home.tpu("start", limit=60)):
            assert refused.returncode == 1, refused.stdout
            (line,) = [line for line in refused.stderr.splitlines() if "error" in line]
            assert f"cluster 'local' runs Ray 9.9.9, this machine has Ray {own}; " in line
            assert "`tpu stop local`" in line
        assert not home.run("never").path.exists()
        assert json.loads(home.tpu("status", "--json").stdout)[0]["head"] == "UP"
    finally:
        write_atomic(path, text)
    again = home.tpu("start")
    assert again.returncode == 0, again.stderr
    assert "other code" not in again.stderr
