"""The one training loop and everything that must survive a restart."""
