"""ftlab: a fine-tuning laboratory in plain PyTorch."""

__version__ = "0.1.0"
