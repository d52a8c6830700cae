"""The points of a sweep as runs on clusters: checked all together, then started one by one."""

import dataclasses
import os
from collections.abc import Callable, Sequence

from rich.console import Console

from cluster import clusters
from cluster.clusters import Cluster
from cluster.errors import ConfigError, PodlaunchError
from launcher import jobs
from launcher.app import bring_up, submit
from launcher.code import pack_data
from launcher.config import LaunchConfig
from launcher.estimate.run import check_memory
from launcher.plan import describe
from launcher.preflight import check_run, pack_code
from launcher.run_files import is_object
from launcher.runs import RunDirectory
from launcher.sweep import NotNow
from launcher.sweep_places import Place
from launcher.sweep_points import Point, wrong_point
from launcher.watch import HeadGone, SupervisorWatch, may_come_back

_TOLD = ("cluster", "price")
"""Of the plan of a launch: what is the same for most points."""


class ClusterRuns:
    """Keeps what the points share: clusters, code, data."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._clusters: dict[str, Cluster] = {}
        self._endpoints: dict[str, str | None] = {}
        self._code: dict[str | None, bytes] = {}
        self._data: tuple[str, bytes | None] | None = None
        """The last one, by its configuration: it may be large."""
        self._watch: tuple[str, Callable[[], str | None]] | None = None

    def find(self, point: Point) -> RunDirectory:
        config = _here(point)
        assert config.run.root is not None, "filled in by with_environment"
        return RunDirectory(f"{config.run.root.rstrip('/')}/{point.run_id}", self._endpoint(config))

    def check(self, places: Sequence[Place]) -> None:
        running: dict[str, Cluster | None] = dict(self._clusters)
        for place in places:
            wanted = _here(place.point).cluster
            if wanted.name not in running:
                clusters.check_name(wanted.name, bare=False)
                running[wanted.name] = clusters.running(wanted)
            try:
                self._check(place, running[wanted.name])
            except ConfigError as error:
                raise wrong_point(place.point.number, place.point.overrides, error) from error

    def bring_up(self, places: Sequence[Place]) -> None:
        told: list[tuple[str, str]] = []
        for place in places:
            config = _here(place.point)
            told += [line for line in describe(config, place.run) if line[0] in _TOLD and line not in told]
        for title, text in told:
            self._say(f"{title:<12}{text}")
        for place in places:
            wanted = _here(place.point).cluster
            known = self._clusters.get(wanted.name)
            if known is None:
                self._clusters[wanted.name] = bring_up(wanted, self._say)
            else:
                clusters.check_fits(known, wanted)

    def most(self, point: Point) -> int:
        wants, known = point.config.slices, self._clusters.get(point.config.cluster.name)
        there = wants if known is None else next((kind for kind in known.config.types if kind.kind == wants.kind), wants)
        return max(1, there.effective_max_slices // wants.slices)

    def start(self, place: Place) -> None:
        config = self._to_submit(place)
        cluster = self._clusters[config.cluster.name]
        try:
            jobs.living(cluster.http)
        except PodlaunchError as error:
            if may_come_back(cluster):
                raise NotNow(f"the head of cluster {cluster.name!r} does not answer; the points that wait start when it is back") from error
            raise HeadGone(f"the head of cluster {cluster.name!r} is gone") from error
        if (data := self._pack_data(config)) is not None:
            place.run.write_data(data)
        submit(cluster, place.run, config, self._pack_code(config))

    def trouble(self, under_way: Sequence[Place]) -> str | None:
        """By the first of them: whether their head is there is the same for all."""
        run, status = under_way[0].run, under_way[0].status
        if status is None:
            return None
        if self._watch is None or self._watch[0] != run.url:
            self._watch = run.url, SupervisorWatch(status.cluster, run)
        return self._watch[1]()

    def _check(self, place: Place, running: Cluster | None) -> None:
        config = self._to_submit(place)
        check_memory(config)
        check_run(config, self._endpoint(config))
        self._pack_code(config)
        self._pack_data(config)
        if running is not None:
            clusters.check_fits(running, config.slices)

    def _to_submit(self, place: Place) -> LaunchConfig:
        """A run that is there goes on."""
        config = _here(place.point)
        return dataclasses.replace(config, run=dataclasses.replace(config.run, resume=place.run.exists()))

    def _endpoint(self, config: LaunchConfig) -> str | None:
        """Of the storage that holds the run directories; an emulated one is started where it does not run."""
        if not is_object(config.run.root or ""):
            return None
        if config.cluster.name not in self._endpoints:
            self._endpoints[config.cluster.name] = clusters.reach_cloud(config.cluster).storage_endpoint
        return self._endpoints[config.cluster.name]

    def _pack_code(self, config: LaunchConfig) -> bytes:
        if config.run.code not in self._code:
            self._code[config.run.code] = pack_code(config)
        return self._code[config.run.code]

    def _pack_data(self, config: LaunchConfig) -> bytes | None:
        if config.data is None or not is_object(config.run.root or ""):
            return None
        if self._data is None or self._data[0] != repr(config.data):
            self._data = repr(config.data), pack_data(config.data)
        return self._data[1]

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)


def _here(point: Point) -> LaunchConfig:
    """With what this machine's environment adds, which is no part of what the point is. Raises ConfigError, which names the point."""
    try:
        return point.config.with_environment(os.environ).with_absolute_paths()
    except ConfigError as error:
        raise wrong_point(point.number, point.overrides, error) from error
