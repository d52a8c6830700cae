"""What a training step needs and how fast it can be, from numbers alone: no device, no JAX."""
