"""The startup script of a TPU VM: from boot to the host agent.

A prebuilt image holds an environment and the hash of the bundle that it was built from. When that is the bundle of the cluster, nothing
is installed and the host is up at once.
"""

from string import Template

_SCRIPT = Template("""#!/bin/bash
# Podlaunch host bootstrap: runs at every boot.
home="$${PODLAUNCH_HOME:-/opt/podlaunch}"
wanted="$bundle"
present="$$(cat "$$home/bundle.sha256" 2>/dev/null)"
if [ "$$present" != "$$wanted" ]; then
  echo "podlaunch: this image holds the bundle '$$present', the cluster wants '$$wanted'" >&2
  exit 1
fi
exec "$$home/bin/python" -m $agent
""")


def startup_script(bundle: str, *, agent: str = "cluster.vm.host_agent") -> str:
    """The script that makes a VM whose image holds `bundle` run `agent`."""
    return _SCRIPT.substitute(bundle=bundle, agent=agent)
