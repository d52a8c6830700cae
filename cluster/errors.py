"""The root of every error that a user may see.

PodlaunchError            one clear line: what, which, why, what to do next
├── ConfigError           a setting is wrong; nothing was started (exit code 2)
├── ClusterError          the cluster cannot be brought up, reached or ended
└── cluster.cloud_errors.CloudError and its children: what a Google Cloud service refuses
"""


class PodlaunchError(Exception):
    """An error whose text is written for the user: one line, with the next thing to do.

    `exit_code` is what the command line ends with.
    """

    exit_code = 1


class ConfigError(PodlaunchError):
    """A setting is wrong. Raised before anything is started, so it never costs a cloud second."""

    exit_code = 2


class ClusterError(PodlaunchError):
    """The cluster cannot be brought up, reached or ended."""
