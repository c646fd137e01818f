"""Other people's snapshots: read as data, never executed, and written into a store."""
