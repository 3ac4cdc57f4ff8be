"""Logs of QEMU's -d int, and what its monitor prints."""
