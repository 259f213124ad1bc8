"""What leaves the export and what every runtime opens: whole, or refused."""
