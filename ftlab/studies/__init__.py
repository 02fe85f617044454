"""Reports and sweeps: knows run folders, not tensors."""
