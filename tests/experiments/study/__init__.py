"""The study: its protocol, its outcomes, its statistics."""
