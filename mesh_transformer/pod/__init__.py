"""Hosts: one worker holds one host's devices."""
