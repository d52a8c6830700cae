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
# The agent is started again when it dies; what it keeps alive lives on meanwhile, and the next one takes it over.
pause=1
trap 'ending=1; kill -TERM "$$pid" 2>/dev/null' TERM
while true; do
  "$$home/bin/python" -m cluster.vm.host_agent &
  pid=$$!
  began=$$SECONDS
  wait "$$pid"; code=$$?
  while kill -0 "$$pid" 2>/dev/null; do wait "$$pid"; code=$$?; done
  [ -n "$$ending" ] || [ "$$code" -eq 0 ] && exit 0
  [ $$((SECONDS - began)) -ge 60 ] && pause=1
  echo "podlaunch: the agent ended with code $$code; again in $$pause s" >&2
  sleep "$$pause" & wait $$!
  [ -n "$$ending" ] && exit 0
  pause=$$((pause < 30 ? pause * 2 : 30))
done
""")


def startup_script(bundle: str) -> str:
    """The script that makes a VM whose image holds `bundle` a host of its cluster."""
    return _SCRIPT.substitute(bundle=bundle)
