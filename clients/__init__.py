"""What a partner runs beside its data."""
