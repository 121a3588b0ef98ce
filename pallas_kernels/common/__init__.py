"""What every operation needs: argument checks, platform, chip table, shard_map entry, padding."""
