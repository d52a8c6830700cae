"""A run as its users' own tools see it: a real Prometheus, the queries of the Grafana dashboard, Ray's dashboard in a real browser."""

import json
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.ports import free_port
from cluster.ray_http import RayHttp
from launcher.gang.gauges import MEASUREMENTS, PREFIX
from launcher.runs import FINAL, RunDirectory, RunState
from tests.debian import program
from tests.integration.browser import browser
from tests.integration.conftest import Home, eventually
from tests.integration.wandb_file import history

pytestmark = pytest.mark.timeout(600)

RUN = "watched"
SETTINGS = {
    "run": {"name": RUN},
    "trainer": {
        "steps": 100_000,
        "seq_len": 32,
        "wandb": {"project": "a-project", "mode": "offline"},
        "checkpoint_every": 5,
        "log_every": 2,
        "eval_batches": 1,
        "samples": {"prompts": ["def f("], "max_tokens": 4},
    },
}
DRAWN = "[...document.querySelectorAll('.scatterlayer path.js-line')].filter(line => line.getTotalLength() > 100).length"
"""How many curves are on the page."""
WITHOUT_DATA = ("mfu",)
"""The devices are no TPUs."""


@pytest.fixture(scope="module")
def watched(home: Home) -> Iterator[RunDirectory]:
    """A run that goes on until somebody stops it, and has a checkpoint."""
    config = home.folder / "watched.yaml"
    config.write_text(yaml.safe_dump({"model": {"variant": "gemma3-nano"}, "data": {"source": "python_stdlib"}, **SETTINGS}))
    begun = home.tpu("train", "run", str(config), "--detach")
    assert begun.returncode == 0, begun.stdout + begun.stderr
    run = home.run(RUN)
    eventually(lambda: (status := run.status()) is not None and status.checkpoint is not None, "a checkpoint")
    yield run
    if home.status(RUN).state not in FINAL:
        home.tpu("train", "stop", RUN, "--now")
        eventually(lambda: home.status(RUN).state is RunState.STOPPED, "the end of the run")


@pytest.fixture(scope="module")
def monitoring(home: Home, watched: RunDirectory) -> Path:
    folder = home.folder / "monitoring"
    made = home.tpu("dashboard", "--monitoring", str(folder))
    assert made.returncode == 0, made.stderr
    assert f"prometheus --config.file={folder}/prometheus.yml" in made.stdout
    return folder


@pytest.fixture(scope="module")
def query(monitoring: Path) -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """Asks a Prometheus that runs with the configuration as it was written."""
    base = f"http://127.0.0.1:{(port := free_port('127.0.0.1'))}"
    command = [program("prometheus", "prometheus"), f"--config.file={monitoring / 'prometheus.yml'}", "--log.level=warn"]
    command += [f"--storage.tsdb.path={monitoring / 'data'}", f"--web.listen-address=127.0.0.1:{port}"]
    with (monitoring / "prometheus.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:

        def ask(expression: str) -> list[dict[str, Any]]:
            address = f"{base}/api/v1/query?query={urllib.parse.quote(expression)}"
            try:
                with urllib.request.urlopen(address, timeout=10) as answer:
                    result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
                    return result
            except ConnectionRefusedError as error:
                assert server.poll() is None, (monitoring / "prometheus.log").read_text()
                raise error
            except urllib.error.URLError:  # it does not listen yet
                assert server.poll() is None, (monitoring / "prometheus.log").read_text()
                return []

        try:
            yield ask
        finally:
            server.terminate()


def test_prometheus_finds_the_run_and_its_hosts(home: Home, watched: RunDirectory, query: Callable[[str], list[dict[str, Any]]]) -> None:
    began = time.monotonic()
    mine = f'run="{RUN}", cluster="local"'
    eventually(lambda: len(query(f"ray_podlaunch_host_memory_bytes{{{mine}}}")) == 2, "two hosts in Prometheus", limit=120)
    eventually(lambda: bool(query(f"ray_podlaunch_loss{{{mine}}}")), "a loss in Prometheus", limit=60)
    print(f"\nthe loss is in Prometheus {time.monotonic() - began:.0f} s after that was started")
    (loss,) = query(f"ray_podlaunch_loss{{{mine}}}")
    assert any(float(loss["value"][1]) == pytest.approx(row["loss"]) for row in watched.metrics() if "loss" in row)
    (running,) = query(f"ray_podlaunch_run_state{{{mine}}} == 1")
    assert running["metric"]["state"] == "RUNNING"
    slices = {one["metric"]["state"]: float(one["value"][1]) for one in query(f"ray_podlaunch_slices{{{mine}}}")}
    assert slices == {"pending": 0, "ready": 1, "interrupted": 0, "lost": 0, "deleting": 0}
    hosts = [one["metric"] for one in query(f"ray_podlaunch_host_step{{{mine}}}")]
    (name,) = home.status(RUN).slices
    assert {host["host"] for host in hosts} == {f"{name}/0", f"{name}/1"}
    assert len({host["instance"] for host in hosts}) == 2, "each host tells of itself"
    found = {one["metric"]["__name__"] for one in query(f"{{{mine}}}")}
    assert {f"ray_{PREFIX}{one.name}" for one in MEASUREMENTS if one.name not in WITHOUT_DATA} <= found


def test_every_query_of_the_grafana_dashboard_has_data(monitoring: Path, query: Callable[[str], list[dict[str, Any]]]) -> None:
    board = json.loads((monitoring / "grafana" / "dashboards" / "podlaunch.json").read_text())
    asked = [(panel["title"], target["expr"]) for panel in board["panels"] for target in panel.get("targets", [])]
    assert len(asked) > 20
    for title, expression in asked:
        plain = expression.replace("$cluster", "local").replace("$run", RUN)
        assert "$" not in plain, plain
        if any(name in expression for name in WITHOUT_DATA):
            assert query(plain) == []
        else:
            eventually(lambda plain=plain: bool(query(plain)), f"data for {title}: {plain}", limit=60)  # type: ignore[misc]
    for source in board["templating"]["list"][1:]:
        assert query(source["query"]["query"].removeprefix("label_values(").rsplit(",", 1)[0].replace("$cluster", "local"))


def test_ray_knows_the_run_by_names_that_one_reads(home: Home, watched: RunDirectory) -> None:
    url = json.loads(home.tpu("status", "--json").stdout)[0]["dashboard"]
    http = RayHttp(url, home.state / "clusters" / "local" / "token")
    (job,) = [job for job in http.get("/api/jobs/") if job["submission_id"] == RUN]
    about = {"cluster": "local", "attempt": "0", "total_steps": "100000"}
    assert job["metadata"] == {"job_name": RUN, "run_directory": watched.url, **about}
    actors = http.get("/api/v0/actors?detail=true&limit=1000")["data"]["result"]["result"]
    (slice_name,) = home.status(RUN).slices
    mine = {actor["name"]: actor for actor in actors if actor["state"] == "ALIVE" and actor["name"].startswith(f"{RUN}/")}
    assert set(mine) == {f"{RUN}/0/{slice_name}/{worker}" for worker in (0, 1)}
    for worker in (0, 1):
        actor = mine[f"{RUN}/0/{slice_name}/{worker}"]["actor_id"]
        wanted = watched.read_log(0, worker).decode().splitlines()[0]
        eventually(lambda actor=actor, wanted=wanted: wanted in log_of(http, url, actor), f"the log of host {worker} in Ray's", limit=20)  # type: ignore[misc]


def log_of(http: RayHttp, url: str, actor: str) -> str:
    """What Ray's dashboard shows as the log of an actor."""
    request = urllib.request.Request(f"{url}/api/v0/logs/file?actor_id={actor}&suffix=out&lines=1000", headers=http.headers())
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(answer.read().decode())


def test_rays_dashboard_shows_the_run_in_a_browser(home: Home, watched: RunDirectory) -> None:
    url = json.loads(home.tpu("status", "--json").stdout)[0]["dashboard"]
    token = (home.state / "clusters" / "local" / "token").read_text().strip()
    with browser() as page:
        page.send_headers({"Authorization": f"Bearer {token}"})
        page.open(f"{url}/#/jobs")
        page.text(RUN, "RUNNING")
        page.screenshot(home.folder / "jobs.png")
        page.open(f"{url}/#/actors")
        page.text(*(f"{RUN}/0/{home.status(RUN).slices[0]}/{worker}" for worker in (0, 1)), "ALIVE")
        page.screenshot(home.folder / "actors.png")
    for name in ("jobs.png", "actors.png"):
        assert (home.folder / name).stat().st_size > 10_000


def test_a_profile_of_every_host_is_read_by_xprof(home: Home, watched: RunDirectory) -> None:
    began = time.monotonic()
    done = home.tpu("train", "profile", RUN, "--steps", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    print(f"\ntwo hosts traced after {time.monotonic() - began:.1f} s")
    folder = next(Path(line) for line in done.stdout.splitlines() if line.startswith("/"))
    traces = sorted(folder.glob("*.xplane.pb"))
    assert [path.name for path in traces] == ["host-0.xplane.pb", "host-1.xplane.pb"]
    told = [event for event in watched.events() if event["event"] == "profile"]
    assert {event["host"][-2:] for event in told} == {"/0", "/1"}
    assert all(event["last"] - event["first"] == 2 for event in told)
    from xprof.convert import raw_to_tool_data

    names = [str(path) for path in traces]
    shown, _ = raw_to_tool_data.xspace_to_tool_data(names, "trace_viewer@", {"resolution": 8000})
    assert b"train" in (shown if isinstance(shown, bytes) else shown.encode()), "the steps bear a name"
    eventually(lambda: watched.profile_requested() is None, "the request is answered", limit=20)


def test_tensorboard_reads_what_the_run_wrote(watched: RunDirectory) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(watched.path / "tensorboard"))
    read.Reload()
    losses = {event.step: event.value for event in read.Scalars("train/loss")}
    logged = {row["step"]: row["loss"] for row in watched.metrics() if "loss" in row}
    assert len(losses) > 5
    assert all(value == pytest.approx(logged[step], rel=1e-6) for step, value in losses.items())


@pytest.fixture(scope="module")
def stopped(home: Home, watched: RunDirectory) -> RunDirectory:
    done = home.tpu("train", "stop", RUN)
    assert done.returncode == 0, done.stderr
    eventually(lambda: home.status(RUN).state is RunState.STOPPED, "the end of the run", limit=120)
    return watched


def test_the_end_of_the_run_reaches_prometheus(stopped: RunDirectory, query: Callable[[str], list[dict[str, Any]]]) -> None:
    eventually(lambda: bool(query(f'ray_podlaunch_run_state{{run="{RUN}", state="STOPPED"}} == 1')), "its last state", limit=60)


def test_weights_and_biases_has_what_was_logged(stopped: RunDirectory) -> None:
    (file,) = stopped.path.glob(f"wandb/offline-run-*-{RUN}/*.wandb")
    told = {row["step"]: row["train/loss"] for row in history(file) if "train/loss" in row}
    assert told == {row["step"]: row["loss"] for row in stopped.metrics() if "loss" in row}


def test_the_report_of_the_run_is_one_page_that_needs_no_network(home: Home, stopped: RunDirectory) -> None:
    made = home.tpu("train", "report", RUN)
    assert made.returncode == 0, made.stderr
    file = home.folder / f"{RUN}.html"
    assert made.stdout.strip() == file.name
    with browser() as page:
        page.open(file.as_uri())
        text = page.text(f"Run {RUN}", "stopped on request", "tokens a second", "attempt 0", "def f(", "gemma3-nano")
        assert f"{home.status(RUN).goodput:.1%}" in text
        assert page.evaluate("document.querySelectorAll('.js-plotly-plot').length") == 4
        assert page.evaluate(DRAWN) >= 3
        assert page.evaluate("performance.getEntriesByType('resource').length") == 0
        page.screenshot(home.folder / "report.png")
    assert (home.folder / "report.png").stat().st_size > 10_000


def test_series_end_with_who_told_them(stopped: RunDirectory, query: Callable[[str], list[dict[str, Any]]]) -> None:
    eventually(lambda: not query(f'{{run="{RUN}"}}'), "the end of all series of the run", limit=120)
