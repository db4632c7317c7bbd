"""Proofs on a user's own config: that the mesh changes nothing, and that several processes do as one does."""
