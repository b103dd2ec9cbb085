"""Exploits that were tried on programs of this kind, kept as tests."""
