"""Published weights: folders in the Hugging Face format, here, on gs:// or on the hub. Knows no JAX."""
