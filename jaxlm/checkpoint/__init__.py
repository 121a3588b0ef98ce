"""What is on disk of a run's state, written atomically and verified before it is believed."""
