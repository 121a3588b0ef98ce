"""Training as pure functions of (state, batch): no files, no signals."""
