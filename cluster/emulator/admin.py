"""The admin endpoint: what a user or a test of another process does to the emulated cloud. JSON over HTTP on loopback, for this user only.

GET    /nodes                  [{name, state, queuedResource, hosts: [{worker, ip, exited, held}]}]
POST   /preempt                {node, notice?}           POST /maintain  {node, notice?}
POST   /host                   {node, worker, action}    action: kill, hang, wake or boot
POST   /run                    {node, worker, command}  what SSH is for: {code, output}
POST   /environment            {node, worker}           what a process of the host starts with: {env, cwd}
GET    /instances              [{name, status, ip, exited, held, labels}]
POST   /instance               {instance, action}        action: kill, hang, wake, boot, lose (it is gone), terminate
POST   /state                  {node, state}
GET    /faults                 {number: rule}            POST /faults    a rule, or {preset, ...}: {"id": number}
DELETE /faults/NUMBER          DELETE /faults
GET    /limits                 {capacity: [...], quota: [...], unreachable: [zone]}
POST   /capacity               {zone, what, amount}      amount null: without limit
POST   /quota                  {place, generation, amount, spot?}
POST   /reachable              {zone, reachable}
POST   /storage                {reachable}             false: every request to the object storage waits until it is true again
GET    /clock                  {now}                     POST /clock     {advance}
"""

import functools
import json
from collections.abc import Callable
from typing import Any

from cluster.emulator.checks import FAILED_PRECONDITION, INVALID_ARGUMENT, NOT_FOUND
from cluster.emulator.cloud import Cloud
from cluster.emulator.faults import Fault
from cluster.emulator.http import Answer, Request
from cluster.emulator.model import Refusal
from cluster.emulator.rest import error_answer
from cluster.emulator.storage import NOT_INSTALLED, Storage


class Admin:
    """Answers HTTP requests about one cloud."""

    def __init__(self, cloud: Cloud, storage: Storage | None = None) -> None:
        """`storage`: None where there is none."""
        self._cloud, self._storage = cloud, storage
        acts = {"kill": cloud.kill_host, "hang": cloud.hang_host, "wake": cloud.wake_host, "boot": cloud.boot_host}
        instances = cloud.instances
        lives: dict[str, Callable[[str], None]] = {
            "kill": instances.kill,
            "hang": instances.hang,
            "wake": instances.wake,
            "boot": instances.boot,
            "lose": instances.lose,
            "terminate": functools.partial(instances.lose, keep=True),
        }
        self._routes: dict[tuple[str, str], Callable[[dict[str, Any]], Any]] = {
            ("GET", "/nodes"): lambda _: cloud.describe(),
            ("POST", "/preempt"): lambda values: cloud.preempt(values["node"], notice=values.get("notice")),
            ("POST", "/maintain"): lambda values: cloud.maintain(values["node"], notice=values.get("notice")),
            ("POST", "/host"): lambda values: acts[values["action"]](values["node"], int(values["worker"])),
            ("POST", "/run"): lambda values: cloud.run_on_host(values["node"], int(values["worker"]), values["command"]),
            ("POST", "/environment"): lambda values: cloud.host_environment(values["node"], int(values["worker"])),
            ("GET", "/instances"): lambda _: instances.describe(),
            ("POST", "/instance"): lambda values: lives[values["action"]](values["instance"]),
            ("POST", "/state"): lambda values: cloud.set_node_state(values["node"], values["state"]),
            ("GET", "/faults"): lambda _: {number: rule.to_dict() for number, rule in cloud.faults.rules().items()},
            ("POST", "/faults"): lambda values: {"id": cloud.faults.add(Fault.from_dict(values))},
            ("DELETE", "/faults"): lambda _: cloud.faults.clear(),
            ("GET", "/limits"): lambda _: cloud.limits(),
            ("POST", "/capacity"): lambda values: cloud.set_capacity(values["zone"], values["what"], values["amount"]),
            ("POST", "/quota"): lambda values: cloud.set_quota(
                values["place"], values["generation"], values["amount"], spot=values.get("spot", False)
            ),
            ("POST", "/reachable"): lambda values: cloud.set_reachable(values["zone"], values["reachable"]),
            ("POST", "/storage"): self._reach_storage,
            ("GET", "/clock"): lambda _: {"now": cloud.clock.now()},
            ("POST", "/clock"): self._advance,
        }

    def answer(self, request: Request) -> Answer:
        try:
            done = self._do(request)
            return Answer(200, json.dumps({} if done is None else done))
        except Refusal as refusal:
            return error_answer(refusal)
        except KeyError as error:
            return error_answer(Refusal(INVALID_ARGUMENT, f"{error} is missing or has no such value"))
        except (ValueError, TypeError) as error:
            return error_answer(Refusal(INVALID_ARGUMENT, str(error)))

    def _do(self, request: Request) -> Any:
        """Raises Refusal, and ValueError, TypeError or KeyError for wrong values."""
        values = json.loads(request.body) if request.body.strip() else {}
        if not isinstance(values, dict):
            raise ValueError("The body must be a JSON object.")
        folder, _, number = request.path.rpartition("/")
        if (request.verb, folder) == ("DELETE", "/faults"):
            if not self._cloud.faults.remove(int(number)):
                raise Refusal(NOT_FOUND, f"there is no fault {number}")
            return {}
        route = self._routes.get((request.verb, request.path))
        if route is None:
            raise Refusal(NOT_FOUND, f"there is no {request.verb} {request.path} here")
        return route(values)

    def _reach_storage(self, values: dict[str, Any]) -> None:
        if self._storage is None:
            raise Refusal(FAILED_PRECONDITION, f"object storage: {NOT_INSTALLED}")
        if not isinstance(values["reachable"], bool):
            raise ValueError("reachable must be true or false")
        self._storage.set_reachable(values["reachable"])

    def _advance(self, values: dict[str, Any]) -> dict[str, Any]:
        seconds = float(values["advance"])
        if seconds < 0:
            raise ValueError("advance must not be negative: time runs one way")
        self._cloud.clock.advance(seconds)
        return {"now": self._cloud.clock.now()}
