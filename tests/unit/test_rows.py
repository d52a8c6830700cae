"""Lines that are whole, or raise."""

import json
import resource
from pathlib import Path

import pytest

from launcher.training.rows import Rows


def test_a_line_that_does_not_fit_raises_and_the_next_writer_begins_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = Rows(path)
    rows.write({"step": 1})
    least, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 3, most))  # the kernel takes what fits, as it does on a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            rows.write({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (least, most))
    rows.close()
    again = Rows(path)
    again.write({"step": 2})
    again.close()
    first, torn, second = path.read_text().splitlines()
    assert [json.loads(line) for line in (first, second)] == [{"step": 1}, {"step": 2}]
    assert torn == '{"s'
