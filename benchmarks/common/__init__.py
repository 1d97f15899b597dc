"""What several benchmarks share. A program is started by its path, so its folder is where imports look."""
