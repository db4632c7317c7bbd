"""A cloud without a cloud: `bin/gcloud` answers as Google's does, and its TPU VMs are processes of this computer."""
