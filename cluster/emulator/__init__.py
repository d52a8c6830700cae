"""A Cloud TPU service on this machine: the v2 API over gRPC, and hosts as process groups with metadata servers of their own."""
