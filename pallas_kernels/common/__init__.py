"""Holds what every operation needs: checks, platform, chip table, shard_map entry, padding."""
