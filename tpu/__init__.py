"""The launcher: Cloud TPU VMs from a laptop with Python and `gcloud`. It imports the standard library and itself."""
