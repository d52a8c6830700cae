"""The startup script of a VM: from boot to its agent.

A prebuilt image holds an environment and the hash of the bundle that it was built from. When that is the bundle of the cluster, nothing
is installed and the agent is up at once. Otherwise the bundle is fetched from the cluster's bucket and installed first; that needs a
`python3` (3.8 or later) on the image, and no internet.
"""

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from string import Template

from cluster.vm.bundle import Bundle, BundleLocation
from cluster.vm.metadata import GUEST_ATTRIBUTES_ENABLED, HOST_ATTRIBUTE
from cluster.vm.settings import HostSettings

HOST_AGENT = "cluster.vm.host_agent"

_SCRIPT = Template("""#!/bin/bash
# Podlaunch bootstrap: runs at every boot.
export PODLAUNCH_HOME="$${PODLAUNCH_HOME:-/opt/podlaunch}"
wanted="$bundle"
refuse() {  # why this host cannot join its cluster: into the log of the boot, and where `tpu status` finds it
  echo "podlaunch: $$1" >&2
  at="http://$${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/instance"
  ask=(curl --silent --fail --noproxy '*' --max-time 5 --header "Metadata-Flavor: Google")
  worker="$$("$${ask[@]}" "$$at/attributes/agent-worker-number" 2>/dev/null)" &&
    "$${ask[@]}" --request PUT --data-raw "worker $$worker: $$1" "$$at/guest-attributes/podlaunch/trouble" 2>/dev/null
  exit 1
}
present="$$(cat "$$PODLAUNCH_HOME/bundle.sha256" 2>/dev/null)"
if [ "$$present" != "$$wanted" ]; then
$otherwise
fi
# The agent is started again when it dies; what it keeps alive lives on meanwhile, and the next one takes it over.
pause=1
trap 'ending=1; kill -TERM "$$child" 2>/dev/null' TERM
while true; do
  "$$PODLAUNCH_HOME/bin/python" -m $agent &
  child=$$!
  began=$$SECONDS
  wait "$$child"; code=$$?
  while kill -0 "$$child" 2>/dev/null; do wait "$$child"; code=$$?; done
  [ -n "$$ending" ] || [ "$$code" -eq 0 ] && exit 0
  [ $$((SECONDS - began)) -ge 60 ] && pause=1
  echo "podlaunch: the agent ended with code $$code; again in $$pause s" >&2
  sleep "$$pause" & wait $$!
  [ -n "$$ending" ] && exit 0
  pause=$$((pause < 30 ? pause * 2 : 30))
done
""")
_REFUSE = "  refuse \"this image holds the bundle '$present', the cluster wants '$wanted' and has no bucket to get it from\""
_INSTALL = Template("""\
  if ! command -v python3 >/dev/null; then
    refuse "this image has no python3, with which the bundle would be installed"
  fi
  mkdir -p "$$PODLAUNCH_HOME" || exit 1
  python3 -I - $place <<'END_OF_INSTALL' || exit 1
$program
END_OF_INSTALL""")


def startup_script(bundle: str, location: BundleLocation | None = None, *, agent: str = HOST_AGENT) -> str:
    """The script that makes a VM run `agent` out of `bundle`.

    `bundle`: its hash. `location`: where it is fetched from when the image does not hold it; None: the VM then refuses.
    `agent`: the module to run, with its arguments as a shell would read them.
    """
    otherwise = _REFUSE if location is None else _install(bundle, location, agent)
    return _SCRIPT.substitute(bundle=bundle, otherwise=otherwise, agent=agent)


def host_metadata(bundle: Bundle, settings: HostSettings) -> dict[str, str]:
    """All that we put into the metadata of a slice's hosts."""
    return {"startup-script": startup_script(bundle.hash, bundle.location), HOST_ATTRIBUTE: settings.to_json(), **GUEST_ATTRIBUTES_ENABLED}


def _install(bundle: str, location: BundleLocation, agent: str) -> str:
    # What the agent imports first is what would keep it from starting.
    check = f"import {shlex.split(agent)[0]}, ray, jax"
    place = json.dumps({**asdict(location), "bundle": bundle, "check": check})
    program = (Path(__file__).parent / "install.py").read_text(encoding="utf-8")
    return _INSTALL.substitute(place=shlex.quote(place), program=program.rstrip())
