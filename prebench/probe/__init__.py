"""Internal visual probes: extraction, linear probes, patch structure."""
