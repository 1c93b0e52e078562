"""Many partners in one process."""
