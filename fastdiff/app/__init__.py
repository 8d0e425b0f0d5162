"""The terminal: commands, files and pictures, and the numbers published of the bundled models."""
