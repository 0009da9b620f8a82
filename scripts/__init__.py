"""Further commands: python -m scripts.NAME, from the project's folder."""
