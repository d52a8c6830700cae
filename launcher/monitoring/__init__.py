"""What a Prometheus and a Grafana of the user's need to show the runs of a cluster (docs/monitoring.md)."""
