"""The sections of scripts/gpu_suite.py: each is a module with `run(section)`, in a process of its own."""
